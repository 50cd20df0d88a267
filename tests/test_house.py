"""The house keeps its own rules: imports point one way, rooms stay small, one door to accelerate.

Raising a budget or adding an edge is allowed, with a line of reason beside it: that is what makes it a decision.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lmcore"
ROOMS = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")

ROOM_LINES = 450
"""A room is one idea; above this it is two, or something in it can be deleted."""
LARGER_ROOMS: dict[str, tuple[int, str]] = {
    "config": (575, "the schema: each of some 130 options with its line of help"),
    "plan": (500, "one page of arithmetic: what lies where in memory, with its sources"),
    "order": (
        480,
        "one idea, proved as a whole: positions, mixtures, skips and the cursor share their arithmetic",
    ),
}
"""room -> (lines, reason)"""

SCRIPT_LINES = 400
LOOP_LINES = 80

ONE_DOOR = {"accelerate", "deepspeed"}
DOOR = {"engine"}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_rooms(path: Path, *, top_level_only: bool) -> set[str]:
    """The rooms of lmcore that a file imports."""
    found: set[str] = set()
    module = tree(path)
    nodes = module.body if top_level_only else list(ast.walk(module))
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            if node.module == "lmcore":
                found |= {alias.name for alias in node.names if alias.name in ROOMS}
            elif node.module.startswith("lmcore."):
                found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("lmcore.")}
    return found & set(ROOMS)


def outside_imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
    return found


def test_there_are_rooms_to_check() -> None:
    assert {"order", "text", "engine", "checkpoint", "report"} <= set(ROOMS)


def test_imports_point_one_way() -> None:
    """No cycle among the rooms, counting the lazy imports too (law 19)."""
    edges = {room: imported_rooms(PACKAGE / f"{room}.py", top_level_only=False) - {room} for room in ROOMS}
    done: set[str] = set()
    while len(done) < len(edges):
        free = {room for room, needs in edges.items() if room not in done and needs <= done}
        assert free, f"a cycle among { ({r: sorted(e - done) for r, e in edges.items() if r not in done}) }"
        done |= free


def test_only_the_engine_knows_accelerate_and_deepspeed() -> None:
    for room in ROOMS:
        if room in DOOR or room.startswith("_"):
            continue
        assert not outside_imports(PACKAGE / f"{room}.py") & ONE_DOOR, room
    private = {room for room in ROOMS if room.startswith("_")}
    for room in ROOMS:
        uses = imported_rooms(PACKAGE / f"{room}.py", top_level_only=False) & private
        if uses & {r for r in private if outside_imports(PACKAGE / f"{r}.py") & ONE_DOOR}:
            assert room in DOOR or room.startswith("_"), f"{room} goes around the door: {uses}"


def test_configuration_is_a_leaf() -> None:
    """Rooms take plain arguments; only the script and the command line know the config (law 21)."""
    # relations and option_help are parts of the command line; the joints are parts of the script that the verbs of
    # __main__ share with it: they hand plain values to the rooms, and no room imports them.
    joints = {
        "assemble",
        "_assemble_plan",
        "budget",
        "dev_run",
        "resume",
        "session",
        "_verbs_plan",
        "_verbs_saved",
    }
    joints.add("__main__")
    allowed = {"config", "command_line", "relations", "option_help"} | joints
    for room in set(ROOMS) - joints:
        assert not imported_rooms(PACKAGE / f"{room}.py", top_level_only=False) & joints, room
    for room in set(ROOMS) - allowed:
        assert not imported_rooms(PACKAGE / f"{room}.py", top_level_only=False) & {
            "config",
            "command_line",
        }, room


def test_rooms_stay_small() -> None:
    for room in ROOMS:
        lines = len((PACKAGE / f"{room}.py").read_text(encoding="utf-8").splitlines())
        budget, _reason = LARGER_ROOMS.get(room, (ROOM_LINES, ""))
        assert lines <= budget, f"lmcore/{room}.py has {lines} lines, the budget is {budget}"


def test_the_script_reads_like_a_table_of_contents() -> None:
    script = ROOT / "train_lm.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) <= SCRIPT_LINES
    loops = [n for n in ast.walk(tree(script)) if isinstance(n, ast.While | ast.For)]
    longest = max((n.end_lineno or n.lineno) - n.lineno + 1 for n in loops)
    assert 40 <= longest <= LOOP_LINES, f"the training loop has {longest} lines"
    for room in ROOMS:
        assert "train_lm" not in outside_imports(PACKAGE / f"{room}.py"), f"{room} imports the script"


def test_every_room_introduces_itself() -> None:
    for room in ROOMS:
        assert ast.get_docstring(tree(PACKAGE / f"{room}.py")), f"lmcore/{room}.py has no docstring"


def test_no_hidden_randomness() -> None:
    """Every draw is keyed (law 10): the global generators of random and numpy are not used."""
    for room in ROOMS:
        text = (PACKAGE / f"{room}.py").read_text(encoding="utf-8")
        assert not re.search(r"\bnp\.random\.(rand|randn|randint|permutation|shuffle|seed)\(", text), room
        assert not re.search(r"^\s*random\.(random|randint|shuffle|choice|seed)\(", text, re.MULTILINE), room


def test_the_readme_maps_every_room() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for room in ROOMS:
        if not room.startswith("_"):
            assert f"`{room}.py`" in readme, f"the README's map does not name {room}.py"
