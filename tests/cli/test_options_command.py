"""``lmcore schema`` and ``lmcore completion``: generated from the options, so that they cannot disagree."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lmcore.cli.main import COMMANDS, main
from lmcore.cli.options import completion_script, json_schema
from lmcore.config import yaml
from lmcore.config.parse import RECIPES, parse
from lmcore.config.schema import RunConfig, keys, to_dict


def accepts(schema: dict[str, Any], value: Any) -> bool:
    """A small validator: the words of JSON schema that :func:`json_schema` uses."""
    if "anyOf" in schema:
        return any(accepts(one, value) for one in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    types = {
        "object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool,
        "null": type(None),
    }  # fmt: skip
    allowed = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    if not any(
        isinstance(value, types[name]) and not (isinstance(value, bool) and name in ("integer", "number"))
        for name in allowed
    ):
        return False
    if isinstance(value, dict) and "properties" in schema:
        known = schema["properties"]
        return all(name in known and accepts(known[name], inner) for name, inner in value.items())
    if isinstance(value, list) and "items" in schema:
        return all(accepts(schema["items"], item) for item in value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value >= schema.get("minimum", value) and value <= schema.get("maximum", value)
    return True


def test_schema_has_every_option_with_help_and_accepts_every_recipe(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    for name in keys():
        inside = schema
        for part in name.split("."):
            inside = inside["properties"][part]
        assert inside["description"]
    assert accepts(schema, to_dict(RunConfig()))
    for recipe in RECIPES.glob("*.yaml"):
        values = yaml.load(recipe.read_text(encoding="utf-8"), str(recipe))
        assert accepts(schema, values), recipe.name
        assert accepts(schema, to_dict(parse(["--config", str(recipe)])))


@pytest.mark.parametrize(
    "text", ["seed: x", "optim: {lr: [1]}", "unknown: 1", "train: {precision: bf17}", "seed: -1"]
)
def test_schema_refuses_what_the_parser_refuses(text: str) -> None:
    assert not accepts(json_schema(), yaml.load(text, "text"))


def completed(script: Path, *words: str) -> list[str]:
    line = " ".join(f"'{word}'" for word in words)
    program = (
        f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _lmcore; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_bash_completes_commands_options_and_choices(tmp_path: Path) -> None:
    script = tmp_path / "completion.bash"
    script.write_text(completion_script("bash", list(COMMANDS)))
    assert completed(script, "lmcore", "gen") == ["generate"]
    assert completed(script, "lmcore", "train", "--optim.l") == ["--optim.lr"] + [
        name for name in (f"--{key}" for key in keys()) if name.startswith("--optim.lr_")
    ]
    assert completed(script, "lmcore", "train", "--train.precision", "bf") == ["bf16"]
    assert completed(script, "lmcore", "train", "--dry_run", "--optim.nam") == ["--optim.name"], (
        "a switch has no value"
    )
    assert completed(script, "lmcore", "generate", "runs/demo", "--repet") == ["--repetition_penalty"]
    assert completed(script, "lmcore", "generate", "runs/demo", "--optim.nam") == [], (
        "not an option of this command"
    )
    assert completed(script, "lmcore", "plan", "--pro") == ["--probe", "--processes"]
    assert completed(script, "lmcore", "plan", "--data.trai") == ["--data.train"]
