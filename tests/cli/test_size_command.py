"""``lmcore size`` from the command line to the recipe: with runs of a known law in place of training, and once with real ones."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shlex
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lmcore
from lmcore.cli import size
from lmcore.cli.main import main
from lmcore.config.parse import parse
from lmcore.data.tokenizer.training import train_tokenizer
from lmcore.disk import DISK, Call
from lmcore.errors import EXIT_FAULT, EXIT_FINISHED, EXIT_REQUEST, EXIT_SAVED, RequestError
from lmcore.plan import scaling
from lmcore.plan.scaling import Law, effective_tokens
from lmcore.report.curves import read_run
from lmcore.report.html import facts
from lmcore.run import children, ladder, setup, size_search
from lmcore.run.children import Children
from lmcore.run.folder import RunFolder
from tests.support.whole_runs import train, words

TRUE = Law(E=0.3, A=15.0, alpha=0.14, B=15.7, beta=0.12, joint=0.12)
BEST_RATE = 0.014
VOCABULARY, BLOCK = 400, 32


def parameters_of(layers: int, width: int) -> int:
    """Of the modern preset: attention 4 w^2, MLP 8 w^2, head; its norms have no weights."""
    return 12 * layers * width**2 + VOCABULARY * width


class KnownLaw:
    """In place of the children: a probe has a speed, and a run the loss that the law and its rate give."""

    flops = 2e9
    noise = 0.002
    diverges_above = math.inf
    stop_after: int | None = None
    fails: int | None = None
    unsteady = 1.0
    unique = math.inf
    ran: list[str] = []  # noqa: RUF012 -- reset by the fixture

    def __init__(self, folder: RunFolder) -> None:
        self.left = type(self).stop_after

    def __enter__(self) -> KnownLaw:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @contextlib.contextmanager
    def stopping_at_once(self) -> Iterator[None]:
        yield

    def run(self, program: str, argv: list[str], log: Path) -> tuple[int, float]:
        config = parse(argv[argv.index("--config") :])
        fields = config.model.config
        n = parameters_of(fields["num_hidden_layers"], fields["hidden_size"])
        run = Path(config.run_dir or "")
        run.mkdir(parents=True, exist_ok=True)
        if program == "lmcore":
            (run / "plan.json").write_text(json.dumps({"tokens_per_second": self.flops / 6 / n}))
            return 0, 0.1
        if self.left == 0:
            raise children.Stopped
        self.left = self.left and self.left - 1
        self.ran.append(run.name)
        log.write_text("something\nthe last line\n")
        if self.fails is not None:
            return self.fails, 0.1
        steps = int(config.train.duration.value)
        if config.optim.lr > self.diverges_above:
            (run / "status.json").write_text(
                json.dumps({"state": "failed", "step": 3, "exit_code": 70, "diverged": True})
            )
            return 70, 0.1
        blocks = config.train.global_batch_blocks or 0
        off = math.log(config.optim.lr / BEST_RATE / math.sqrt(blocks / 4))
        wave = self.noise * math.sin(1e4 * config.optim.lr + steps + n)
        loss = TRUE.loss(n, effective_tokens(steps * blocks * BLOCK, self.unique)) * (
            1 + 0.01 * off**2 + wave
        )
        speed = self.flops / 6 / n * (self.unsteady if steps % 20 else 1.0)
        records: list[dict[str, Any]] = [
            {"kind": "train", "step": s, "tokens": s * blocks * BLOCK, "tokens_per_second": speed}
            for s in (1, steps)
        ]
        records.append(
            {"kind": "eval", "set": "valid", "step": steps, "tokens": steps * blocks * BLOCK, "loss": loss}
        )
        (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        (run / "status.json").write_text(json.dumps({"state": "finished", "step": steps, "exit_code": 0}))
        return 0, 0.1


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, and a tokenizer for all tests."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "text.txt").write_text(words(3_000, 0))
    (folder / "held.txt").write_text(words(200, 1))
    train_tokenizer([words(500, 2)], vocab_size=VOCABULARY, folder=folder / "tokenizer")
    return folder


@pytest.fixture
def here(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[KnownLaw]:
    """An empty folder with the texts, and a class of children of its own."""
    monkeypatch.chdir(tmp_path)
    for name in ("text.txt", "held.txt"):
        Path(name).write_text((prepared / name).read_text())
    Path("tokenizer").symlink_to(prepared / "tokenizer")
    law = type("Law", (KnownLaw,), {"ran": []})
    monkeypatch.setattr(size, "Children", law)
    monkeypatch.setattr(scaling, "DRAWS", 30)
    monkeypatch.setattr(ladder, "WIDTHS", (32, 64, 96, 128, 192, 256))
    open_text = size_search.Search.open_text

    def and_tell(search: size_search.Search, note: setup.Note) -> None:
        open_text(search, note)
        law.unique = search.unique_tokens

    monkeypatch.setattr(size_search.Search, "open_text", and_tell)
    return law


ASKED = ["size", "--budget", "2 h", "--data.train", "text.txt", "--data.valid", "held.txt", "--data.block_size", str(BLOCK),
         "--tokenizer.path", "tokenizer", "--data.processes", "1"]  # fmt: skip


def known(name: str = "mine") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(f"runs/{name}-size/ladder.json").read_text())
    return found


def test_search_finds_what_is_best_under_a_known_law(
    here: type[KnownLaw], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(ASKED) == EXIT_FINISHED
    out = capsys.readouterr()
    choice, config = known()["choice"], parse(["--config", "recipes/mine.yaml"])
    fields = config.model.config
    n = parameters_of(fields["num_hidden_layers"], fields["hidden_size"])
    tokens = config.train.duration.value * (config.train.global_batch_blocks or 0) * BLOCK
    assert choice["member"] == f"w{fields['hidden_size']}"
    # The rate: that of the known law times the root of the batch, within a step of the grid.
    ideal = BEST_RATE * math.sqrt((config.train.global_batch_blocks or 0) / 4)
    assert 0.5 < config.optim.lr / ideal < 2
    reached = TRUE.loss(n, effective_tokens(tokens, here.unique))
    assert choice["expected"]["low"] <= reached <= choice["expected"]["high"]
    assert config.report.expected_loss == pytest.approx(choice["expected"]["middle"], abs=1e-4)
    assert (config.optim.schedule, config.optim.min_lr_ratio, str(config.optim.decay)) == ("wsd", 0.0, "20%")
    assert config.model.zero_init is True
    assert Path("runs/mine-size/ladder.png").read_bytes().startswith(b"\x89PNG")
    assert f"accelerate launch {size.script()} --config recipes/mine.yaml" in out.out
    assert out.err.count("published") == 4
    assert out.err.count("outside its range") >= 3  # nothing published is about a text of 100 KB
    text = Path("recipes/mine.yaml").read_text()
    for option in ("lr:", "global_batch_blocks:", "duration:", "expected_loss_low:"):
        assert re.search(rf"# .+\n\s+{option}", text), f"a reason above {option}"


def test_search_goes_on_where_it_was_stopped(
    here: type[KnownLaw], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*ASKED, "--out", "recipes/whole.yaml"]) == EXIT_FINISHED
    whole = list(here.ran)
    here.ran.clear()
    here.stop_after = 5
    codes = []
    while not codes or codes[-1] == EXIT_SAVED:
        codes.append(main(ASKED))
        assert len(codes) < 10
        assert json.loads(Path("runs/mine-size/status.json").read_text())["exit_code"] == codes[-1]
    assert codes == [EXIT_SAVED] * (len(whole) // 5) + [EXIT_FINISHED]
    assert here.ran == whole, "every rung once, in the same order"
    assert "run the same command to go on" in capsys.readouterr().err
    for name in ("member", "batch_blocks", "rate"):
        assert known()["choice"][name] == known("whole")["choice"][name]


def test_write_only_names_the_runs_that_are_due_and_reads_what_became_of_them(
    here: type[KnownLaw], capsys: pytest.CaptureFixture[str]
) -> None:
    stages = []
    for _ in range(8):
        assert main([*ASKED, "--write_only"]) == EXIT_FINISHED
        lines = capsys.readouterr().out.splitlines()
        commands = [shlex.split(line) for line in lines if line.startswith("accelerate launch")]
        if not commands:
            break
        stages.append(len(commands))
        for command in commands:  # the jobs of a cluster
            here(RunFolder("x")).run("train_lm.py", command[3:], Path("job.log"))
    assert stages[0] == 9
    assert stages[-2:] == [5, 3]
    assert Path("recipes/mine.yaml").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--optim.lr", "1e-3"], "optim.lr is chosen by lmcore size"),
        (["--model.config.n_layer", "2"], "model.config is chosen"),
        (["--model.type", "llama"], "model.type is chosen"),
        (["--model.size", "5M", "--model.preset", "gpt2"], "model.size is chosen"),
        (["--train.duration", "3 steps"], "train.duration is chosen"),
        (["--optim.decay", "30%"], "optim.decay is chosen"),
        (["--train.global_batch_tokens", "512"], "train.global_batch_tokens is chosen"),
        (["--run_dir", "runs/x"], "run_dir is named by --out"),
        (["--data.mode", "stream"], "data.mode stream"),
        (["--optim.name", "sgd"], "optim.name must be one of muon, adamw"),
        (["--out", "mine.json"], "a recipe ends with .yaml"),
        (["--out", ""], "a recipe ends with .yaml"),
    ],
)
def test_what_size_chooses_cannot_be_given(
    words: list[str], said: str, here: type[KnownLaw], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*ASKED, *words]) == EXIT_REQUEST
    assert said in capsys.readouterr().err
    assert here.ran == []


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ([], "--budget is missing"),
        (["--budget", "500 steps"], "--budget must be a time"),
        (["--budget", "2 lightyears"], "unknown unit"),
    ],
)
def test_budget_must_be_a_time(budget: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["size", *budget, "--data.train", "x"]) == EXIT_REQUEST
    assert said in capsys.readouterr().err


def test_recipe_of_another_hand_is_not_overwritten(
    here: type[KnownLaw], capsys: pytest.CaptureFixture[str]
) -> None:
    own = Path("own.yaml")
    own.write_text("optim: {lr: 0.001}\n")
    assert main([*ASKED, "--out", str(own)]) == EXIT_REQUEST
    assert "own.yaml exists and is not of lmcore size" in capsys.readouterr().err
    assert own.read_text() == "optim: {lr: 0.001}\n"
    assert not Path("runs").exists()


def test_budget_that_is_too_small_to_measure_is_said_with_one_that_is_not(
    here: type[KnownLaw], capsys: pytest.CaptureFixture[str]
) -> None:
    said = r"too small to measure: .* may take ([-0-9.]+) min.* at least ([0-9]+) min"
    for budget in ("1 s", "3 min"):
        assert main([*ASKED[:2], budget, *ASKED[3:]]) == EXIT_REQUEST
        needed = re.search(said, capsys.readouterr().err)
        assert needed is not None
        assert float(needed[1]) >= 0
    assert main([*ASKED[:2], f"{int(needed[2])} min", *ASKED[3:]]) == EXIT_FINISHED


def test_too_little_text_is_said(here: type[KnownLaw], capsys: pytest.CaptureFixture[str]) -> None:
    Path("text.txt").write_text(words(60, 0))
    assert main(ASKED) == EXIT_REQUEST
    assert "too little text to measure" in capsys.readouterr().err


def test_too_little_validation_text_is_said(here: type[KnownLaw], capsys: pytest.CaptureFixture[str]) -> None:
    Path("held.txt").write_text(words(3, 1))
    assert main(ASKED) == EXIT_REQUEST
    assert "too little validation text" in capsys.readouterr().err


def test_repeated_text_is_said_and_training_ends_where_epochs_stop_to_help(
    here: type[KnownLaw], capsys: pytest.CaptureFixture[str]
) -> None:
    stops = ["--checkpoint.keep_best.k", "3", "--evaluate.early_stopping.patience", "5"]
    assert main([*ASKED, *stops]) == EXIT_FINISHED  # two hours for a text of 100 KB
    said = capsys.readouterr().out
    assert "too little text: it is repeated" in said
    assert known()["choice"]["epochs"] <= scaling.last_useful_epoch()
    config = parse(["--config", "recipes/mine.yaml"])
    assert config.checkpoint.export == "best"
    assert (config.checkpoint.keep_best.k, config.evaluate.early_stopping.patience) == (3, 5), "as asked for"


def test_fit_that_does_not_hold_is_said_on_screen_and_in_the_recipe(
    here: type[KnownLaw], capsys: pytest.CaptureFixture[str]
) -> None:
    here.noise = 0.1
    assert main(ASKED) == EXIT_FINISHED
    assert "the fit does not hold" in capsys.readouterr().out
    assert "the fit does not hold" in Path("recipes/mine.yaml").read_text()


def test_fit_that_holds_is_not_doubted(here: type[KnownLaw], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ASKED) == EXIT_FINISHED
    said = capsys.readouterr().out
    assert "does not hold" not in said
    assert "speed of this machine varies" not in said


def test_speed_that_varies_is_said(here: type[KnownLaw], capsys: pytest.CaptureFixture[str]) -> None:
    here.unsteady = 0.4
    assert main(ASKED) == EXIT_FINISHED
    assert "the speed of this machine varies" in capsys.readouterr().out


def test_rates_that_diverge_are_avoided(here: type[KnownLaw]) -> None:
    here.diverges_above = 0.011
    assert main(ASKED) == EXIT_FINISHED
    rungs = known()["rungs"]
    assert any(one["loss"] is None for one in rungs.values())
    longest = [name for name in rungs if name.endswith(str(4 * known()["design"]["steps"][0]))]
    assert all(float(name.split("lr")[1].split("-")[0]) <= 0.011 for name in longest)


def test_short_run_that_fails_ends_the_search_with_its_last_line(
    here: type[KnownLaw], capsys: pytest.CaptureFixture[str]
) -> None:
    here.fails = 71
    assert main(ASKED) == EXIT_FAULT
    assert "ended with code 71: the last line" in capsys.readouterr().err


def test_other_options_for_the_same_recipe_are_refused(
    here: type[KnownLaw], capsys: pytest.CaptureFixture[str]
) -> None:
    here.stop_after = 1
    assert main(ASKED) == EXIT_SAVED
    for other in ([*ASKED, "--seed", "9"], [*ASKED[:2], "3 h", *ASKED[3:]]):
        assert main(other) == EXIT_REQUEST
        assert "another budget or other options" in capsys.readouterr().err
    folder = RunFolder(Path("runs/mine-size"))
    folder.lock(note=pytest.fail)  # a lock that was left is taken over with a note
    folder.unlock()


@pytest.mark.parametrize("content", ["", '{"asked": ', "[]", "{}", '{"asked": {}, "speeds": 1}', "\udcff"])
def test_damaged_record_of_an_earlier_start_is_refused(
    here: type[KnownLaw], capsys: pytest.CaptureFixture[str], content: str
) -> None:
    Path("runs/mine-size").mkdir(parents=True)
    Path("runs/mine-size/ladder.json").write_bytes(content.encode(errors="surrogateescape"))
    assert main(ASKED) == EXIT_REQUEST
    said = capsys.readouterr().err
    assert "ladder.json is damaged" in said
    assert "--out" in said


def test_folder_that_another_search_holds_is_refused(
    here: type[KnownLaw], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(Path("runs/mine-size"))
    folder.lock(note=lambda line: None)
    try:
        assert main(ASKED) == EXIT_REQUEST
    finally:
        folder.unlock()
    assert "in use" in capsys.readouterr().err


@pytest.fixture
def few_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children that import nothing beforehand; their server outlives the temporary folder of the tests."""
    monkeypatch.setattr(children, "PRELOADED", [])
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")


SLEEPER = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print("started", flush=True)
open(sys.argv[1], "w").close()
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_goes_to_the_run_and_then_stops_the_search(
    tmp_path: Path, few_imports: None, number: int
) -> None:
    """SIGINT, too: ``kill -INT`` reaches this process alone."""
    (tmp_path / "sleep.py").write_text(SLEEPER)
    started = tmp_path / "started"

    def send() -> None:
        while not started.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    before = signal.getsignal(signal.SIGTERM)
    with Children(RunFolder(tmp_path)) as started_by:
        threading.Thread(target=send, daemon=True).start()
        with pytest.raises(children.Stopped):
            started_by.run(str(tmp_path / "sleep.py"), [str(started)], tmp_path / "log")
        with pytest.raises(children.Stopped):
            started_by.run(str(tmp_path / "sleep.py"), [], tmp_path / "log")
    assert signal.getsignal(signal.SIGTERM) is before
    assert (tmp_path / "log").read_text() == "started\n"


def test_stop_file_beside_a_run_that_has_just_ended_stops_the_search(
    tmp_path: Path, few_imports: None
) -> None:
    (tmp_path / "write.py").write_text("import sys\nopen(sys.argv[1], 'w').close()\n")
    with Children(RunFolder(tmp_path)) as started_by, pytest.raises(children.Stopped):
        started_by.run(str(tmp_path / "write.py"), [str(tmp_path / "STOP")], tmp_path / "log")
    assert not (tmp_path / "STOP").exists()


def test_signal_while_a_run_is_being_started_reaches_it(
    tmp_path: Path, few_imports: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child was made and had no pid yet: it ran to its end, hours later."""
    (tmp_path / "sleep.py").write_text(SLEEPER)
    with Children(RunFolder(tmp_path)) as started_by:
        start = started_by._context.Process.start

        def interrupted(process: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)  # a signal is handled between two instructions of Python
            start(process)

        monkeypatch.setattr(started_by._context.Process, "start", interrupted)
        begin = time.monotonic()
        with pytest.raises(children.Stopped):
            started_by.run(str(tmp_path / "sleep.py"), [str(tmp_path / "started")], tmp_path / "log")
        assert time.monotonic() - begin < 50


@pytest.mark.parametrize("stage", ["open_data", "choose"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_where_no_short_run_goes_on_stops_the_search_at_once(
    number: int,
    stage: str,
    here: type[KnownLaw],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The text of hours, and the fit, must not be waited for."""

    class WithSignals(Children):
        def run(self, program: str, argv: list[str], log: Path) -> tuple[int, float]:
            return KnownLaw.run(law, program, argv, log)

    law = here(RunFolder(Path("unused")))
    monkeypatch.setattr(size, "Children", WithSignals)

    def interrupted(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        raise AssertionError("went on")

    monkeypatch.setattr(*((size_search.Search, stage) if stage == "choose" else (setup, stage)), interrupted)
    assert main(ASKED) == EXIT_SAVED
    assert capsys.readouterr().err.splitlines()[-1] == "saved: run the same command to go on"
    assert json.loads(Path("runs/mine-size/status.json").read_text())["state"] == "saved"


def test_full_disk_of_the_search_itself_is_in_its_status(
    here: type[KnownLaw], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(call: Call) -> None:
        if "ladder.json" in call.path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), call.path)

    monkeypatch.setattr(DISK, "before", refuse)
    assert main(ASKED) == EXIT_FAULT
    assert "No space left" in capsys.readouterr().err.splitlines()[-1]
    status = json.loads(Path("runs/mine-size/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", EXIT_FAULT)
    assert "No space left" in status["reason"]


def test_child_gives_its_exit_code_and_output(tmp_path: Path, few_imports: None) -> None:
    (tmp_path / "leave.py").write_text("import sys\nprint(sys.argv[1:])\nsys.exit(int(sys.argv[1]))\n")
    with Children(RunFolder(tmp_path)) as started_by:
        for code in (0, 70):
            found, seconds = started_by.run(
                str(tmp_path / "leave.py"), [str(code), "b c"], tmp_path / f"{code}.log"
            )
            assert found == code
            assert seconds > 0
            assert (tmp_path / f"{code}.log").read_text() == f"['{code}', 'b c']\n"
        assert started_by.run("lmcore", ["--version"], tmp_path / "command.log")[0] == 0
        assert (tmp_path / "command.log").read_text() == f"lmcore {lmcore.__version__}\n"


@pytest.mark.long
@pytest.mark.slow
def test_whole_search_with_real_runs_gives_a_recipe_that_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")  # the server of the forks outlives the tests' own
    Path("text.txt").write_text(words(6_000, 0))
    Path("held.txt").write_text(words(300, 1))
    monkeypatch.setattr(size_search, "PROBES", (32, 64))
    monkeypatch.setattr(ladder, "WIDTHS", (32, 64, 96))
    # The size of a rung, and not the speed of a machine that other tests use too, decides how long this takes.
    monkeypatch.setattr(ladder, "LEAST_STEPS", 10)
    monkeypatch.setattr(
        ladder, "design",
        lambda family, **given: ladder.Design(members=("w32", "w64", "w96"), steps=(20, 20, 20), rate=given["rate"],
                                                   batch_blocks=4, block_size=given["block_size"]),
    )  # fmt: skip
    monkeypatch.setattr(size_search, "KEPT", 0.002)
    own = [*ASKED[:2], "8 h", *ASKED[3:-4], "--tokenizer.vocab_size", str(VOCABULARY), *ASKED[-2:]]
    assert main(own) == EXIT_FINISHED, capsys.readouterr().err
    out = capsys.readouterr().out
    rungs = known()["rungs"]
    assert len(rungs) >= 9 + 3 + 2 + 3
    assert all(one["loss"] > 0 for one in rungs.values())
    assert "expected loss" in out
    config = parse(["--config", "recipes/mine.yaml", "--train.duration", "12 steps"])
    assert config.report.expected_loss is not None
    assert train(["--config", "recipes/mine.yaml", "--train.duration", "12 steps"]) == [0]
    assert "reached" in facts(read_run("runs/mine"))["expected loss"]


def test_values_of_a_file_are_kept_as_those_of_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some words\n" * 2000)
    (tmp_path / "mine.yaml").write_text(
        f"data:\n  train: [{tmp_path}/text.txt]\n  valid_fraction: 0.1\n  block_size: 64\n"
        "tokenizer:\n  vocab_size: 700\noptim:\n  name: adamw\n"
    )
    found = size.requested(["--config", str(tmp_path / "mine.yaml")])
    assert (found.tokenizer.vocab_size, found.optim.name) == (700, "adamw")
    assert (found.data.valid_fraction, found.data.block_size) == (0.1, 64)
    muon = size.requested(["--data.train", str(tmp_path / "text.txt"), "--optim.momentum", "0.9"])
    assert (muon.optim.name, muon.optim.momentum) == ("muon", 0.9)
    (tmp_path / "stream.yaml").write_text(f"data:\n  train: [{tmp_path}/text.txt]\n  mode: stream\n")
    with pytest.raises(RequestError, match=r"data\.mode stream"):
        size.requested(["--config", str(tmp_path / "stream.yaml")])


def test_short_run_on_a_full_disk_ends_the_search(
    here: type[KnownLaw], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its code is that of a run that diverged; it says nothing about the learning rate."""
    here.fails = 70
    assert main(ASKED) == EXIT_FAULT
    assert "ended with code 70: the last line" in capsys.readouterr().err
