"""The command ``lmcore``: quick help, one-line refusals, and commands that do what they say, without a training."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lmcore.cli import doctor, saved
from lmcore.cli.main import COMMANDS, main
from lmcore.data.tokenizer.training import train_tokenizer
from lmcore.disk import DISK, Call
from lmcore.errors import RequestError
from lmcore.model.build import build_model
from lmcore.saved.load import describe
from lmcore.saved.score import score
from tests.support.checkpoints import checkpoints, whole

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["def f(x):\n    return x + 1\n", "吾輩は猫である。名前はまだ無い。\n"] * 40


def run(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "lmcore", *words], capture_output=True, text=True, cwd=cwd, env=environment
    )


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with checkpoints of steps 2 and 4 (the earlier one is the better one) and its tokenizer."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    words = train_tokenizer(TEXTS, vocab_size=330, folder=folder / "tokenizer")
    model = build_model(
        type="gpt2",
        config_overrides={"n_layer": 1, "n_head": 2, "n_embd": 32, "n_positions": 32},
        vocab_size=words.vocab_size,
        special_ids=words.special_ids,
        block_size=32,
        seed=1,
    )
    saves = checkpoints(folder / "checkpoints", background=False)
    for step in (2, 4):
        with torch.no_grad():
            model.transformer.wpe.weight.add_(0.1)
        tensors = [("model", name, "", tensor.detach()) for name, tensor in model.named_parameters()]
        saves.save(
            step,
            tensors=whole(tensors),
            state={"model": describe(model)},
            metrics={"loss": 2.0 + step},
            tokens=64 * step,
        )
        saves.wait()
    return folder


def call(*words: Any) -> int:
    return main([str(word) for word in words])


def test_help_imports_nothing_heavy() -> None:
    """0.06 s on an idle machine."""
    done = run("--help")
    assert done.returncode == 0
    for command in COMMANDS:
        assert f"  {command} " in done.stdout
    code = (
        "import sys; before = set(sys.modules); import lmcore.cli.main as m; m.main(['--help']); "
        "new = set(sys.modules) - before; "
        "print(*sorted(name for name in new if name.partition('.')[0] not in sys.stdlib_module_names))"
    )
    alone = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    words = alone.stdout.splitlines()[-1].split()
    assert all(word.partition(".")[0] == "lmcore" for word in words), words


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):  # argparse and the configuration leave by themselves
        assert call(command, "--help") == 0
    printed = capsys.readouterr()
    assert command in printed.out + printed.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["genrate"], "did you mean 'generate'?"),
        (["generate", "nowhere"], "no such folder"),
        (["generate"], "arguments are required: path"),
        (["generate", "x", "--tempratur", "1"], "--tempratur 1; did you mean '--temperature'?"),
        (["generate", "x", "--prompt", "a", "--prompt=b"], "--prompt is given 2 times"),
        (["evaluate", "x", "--data", "a", "--data", "b"], "--data is given 2 times"),
        (["generate", "x", "--prompt=--seed", "--seed", "1"], "x: no such folder"),  # a value, not an option
        (["generate", "x", "--max_token=3"], "did you mean '--max_tokens'?"),  # no abbreviations
        (["export", "."], "neither a checkpoint nor an export"),
        (["report", "."], "no metrics.jsonl"),
        (["checkpoints", "."], "no checkpoints there"),
        (["order", ".", "--step", "1"], "no config.yaml"),
        (["tokenizer", "test"], "needs a subcommand"),
        (["inspect", "--data.trian", "x"], "data.train"),
        (["inspect", "--data.train", "/no/such/file.txt"], "/no/such/file.txt"),
    ],
)
def test_wrong_command_is_refused_in_one_line_with_code_2(
    words: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*words) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert expected in said[-1]
    assert said[-1].startswith("lmcore: ")
    assert "Traceback" not in "\n".join(said)


@pytest.mark.parametrize(
    "words",
    [
        ["generate"],
        ["evaluate", "--data", "x"],
        ["export"],
        ["report"],
        ["checkpoints"],
        ["order", "--step", "1"],
    ],
)
def test_folder_of_runs_and_mistyped_run_name_the_runs(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "other"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "status.json").write_text("{}")
    assert call(words[0], "runs", *words[1:]) == 2
    assert capsys.readouterr().err.endswith("; its runs are runs/mine, runs/other\n")
    assert call(words[0], "runs/mien", *words[1:]) == 2
    assert capsys.readouterr().err.endswith("; did you mean 'runs/mine'?\n")
    with pytest.raises(RequestError):
        call(*words, "--debug")


@pytest.mark.parametrize(
    "words",
    [
        "evaluate RUN --data x --json",
        "export RUN --out",
        "report RUN --out",
        "generate RUN --checkpoint",
        "export RUN --checkpoint",
    ],
)
def test_empty_name_of_a_file_is_not_the_default(words: str, capsys: Any) -> None:
    """A variable of the shell that is not set: ``--out "$folder"`` replaced the export of the run."""
    assert call(*words.split(), "") == 2
    assert "must not be empty: give a path, or leave it out" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["evaluate RUN --data x --json", "report RUN --out"])
@pytest.mark.parametrize("folder", [".", "..", "/"])
def test_folder_in_place_of_a_file_is_refused_in_one_line(words: str, folder: str, capsys: Any) -> None:
    assert call(*words.split(), folder) == 2
    assert f": {folder} is a folder: give the name of a file; " in capsys.readouterr().err


@pytest.mark.parametrize("word", ["", " ", "=x", "= --json"])
def test_argument_without_a_name_is_refused_in_one_line(word: str, capsys: Any) -> None:
    """As ``"$options"`` gives it where the variable is empty."""
    assert call("checkpoints", "runs/mine", word) == 2
    expected = f"lmcore: unrecognized arguments: {word}; lmcore checkpoints --help shows the options\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("words", ["schema", "prepare --print_config"])
@pytest.mark.parametrize(("place", "code"), [("/dev/full", 70), (os.devnull, 0)])
def test_output_that_is_lost_is_a_fault(
    words: str, place: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with (
        contextlib.suppress(OSError),
        open(place, "w") as stream,
    ):  # what is buffered is lost when it is closed
        monkeypatch.setattr(sys, "stdout", stream)
        try:
            found = call(*words.split())
        except SystemExit as left:
            found = left.code
        assert found == code
        monkeypatch.undo()
    assert ("standard output is not complete" in capsys.readouterr().err) == (code == 70)


@pytest.mark.parametrize(
    ("number", "code"), [(errno.EACCES, 2), (errno.EROFS, 2), (errno.ENOSPC, 70), (errno.EIO, 70)]
)
def test_place_that_cannot_be_written_is_one_line(
    number: int,
    code: int,
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (run_dir / "metrics.jsonl").write_text('{"kind": "train", "step": 2, "tokens": 9, "loss": 2.0}\n')

    def refuse(call: Call) -> None:
        raise OSError(number, os.strerror(number), call.path)

    monkeypatch.setattr(DISK, "before", refuse)
    for words in (
        ["export", run_dir, "--out", tmp_path / "export"],
        ["report", run_dir],
        ["report", run_dir, "--out", tmp_path / "\x1b[2Jpage.html"],
    ):
        assert call(*words) == code
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1].startswith("lmcore: ")
        assert lines[-1].endswith(os.strerror(number))
        assert "\x1b" not in lines[-1]
    with pytest.raises(OSError, match=os.strerror(number)):
        call("report", run_dir, "--debug")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("evaluate RUN --data FILE --blocks -1", "--blocks must be 1 or more"),
        ("evaluate RUN --data FILE --blocks 0", "--blocks must be 1 or more"),
        ("evaluate RUN --data= --blocks 1", "a path must not be empty"),
        ("export RUN --max_shard_gb inf", "--max_shard_gb must be above 0"),
        ("export RUN --max_shard_gb nan", "--max_shard_gb must be above 0"),
    ],
)
def test_numbers_without_a_meaning_are_refused(
    words: str, reason: str, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("some text")
    assert call(*words.replace("RUN", str(run_dir)).replace("FILE", f"{tmp_path}/file").split()) == 2
    assert reason in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("words", ["export RUN --out FILE/below", "report RUN --out FILE/below/page.html"])
def test_file_in_place_of_a_folder_is_one_line(
    words: str, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "metrics.jsonl").write_text('{"kind": "train", "step": 2, "tokens": 9, "loss": 2.0}\n')
    (tmp_path / "file").write_text("mine")
    assert call(*words.replace("RUN", str(run_dir)).replace("FILE", f"{tmp_path}/file").split()) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("lmcore: ")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("file", "content", "remedy"),
    [
        ("a.jsonl", b'{"text": 3}\n', "--on_error skip"),
        ("a.txt", "\u543e\u8f29".encode("cp932"), "set --encoding"),
        ("a.jsonl", b'{"content": "x"}\n', "set --text_field"),
    ],
)
def test_evaluate_names_its_own_options(
    file: str, content: bytes, remedy: str, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / file).write_bytes(content)
    assert call("evaluate", run_dir, "--data", tmp_path / file) in (2, 70)
    line = capsys.readouterr().err.splitlines()[-1]
    assert remedy in line
    assert "data.on_error" not in line
    assert call("evaluate", run_dir, "--data", __file__, "--block_size", 0) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "lmcore: --block_size 0 must be at least 1"


def test_prepare_of_a_stream_says_what_is_not_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("\n".join(f"line {n} of the text" for n in range(600)))
    words = ["--data.train", tmp_path / "text.txt", "--tokenizer.vocab_size", 300, "--data.mode", "stream"]
    words += ["--train.duration", "5 steps", "--data.block_size", 16, "--run_dir", tmp_path / "run"]
    assert call("prepare", *words) == 0
    assert "blocks in an epoch: not known beforehand" in capsys.readouterr().out


@pytest.mark.parametrize("name", [".prepare.lock", "tokenizer"])
def test_prepare_writes_through_no_link(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run folder may come from somebody else."""
    (tmp_path / "text.txt").write_text("\n".join(f"line {n} of the text" for n in range(600)))
    (tmp_path / "run").mkdir()
    precious = tmp_path / "precious"
    if name == "tokenizer":
        precious.mkdir()
    file = precious / "vocab.txt" if name == "tokenizer" else precious
    file.write_text("mine")
    (tmp_path / "run" / name).symlink_to(precious)
    words = (
        "--data.train",
        tmp_path / "text.txt",
        "--tokenizer.vocab_size",
        300,
        "--data.store_dir",
        tmp_path / "stores",
    )
    assert call("prepare", *words, "--run_dir", tmp_path / "run") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("lmcore: ")
    assert file.read_text() == "mine"
    assert not precious.is_dir() or [path.name for path in precious.iterdir()] == ["vocab.txt"]


@pytest.mark.timeout(60)
def test_files_without_an_end_are_refused_as_prompts(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(saved, "_MOST_PROMPT_BYTES", 1000)
    assert call("generate", run_dir, "--prompts", "/dev/zero") == 2
    assert "/dev/zero: more than 1,000 bytes" in capsys.readouterr().err.splitlines()[-1]
    with open("/dev/zero", encoding="utf-8") as endless:
        monkeypatch.setattr(sys, "stdin", endless)
        assert call("generate", run_dir, "--prompt", "-") == 2
    assert "--prompt -: more than 1,000 bytes" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["stores.json", "status.json", "checkpoints/step-00000009/state.json"])
def test_stores_does_not_wait_for_the_writer_of_a_fifo(name: str, tmp_path: Path) -> None:
    (tmp_path / "stores").mkdir()
    path = tmp_path / "runs" / "a" / name
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    assert call("stores", "--store_dir", tmp_path / "stores", "--runs", tmp_path / "runs") == 0


@pytest.mark.parametrize("number", ["\N{SUPERSCRIPT TWO}", "9" * 5000, "\N{CIRCLED DIGIT ONE}"])
@pytest.mark.parametrize("words", ["generate RUN --prompt x --checkpoint", "export RUN --checkpoint", "prepare --worker",
                                   "plan --processes", "train --processes", "train --gpus"])  # fmt: skip
def test_digits_that_are_no_number_are_one_line(
    words: str, number: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*words.replace("RUN", str(run_dir)).split(), number) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("lmcore: ")


@pytest.mark.parametrize("words", ["generate RUN --prompt x", "export RUN", "evaluate RUN --data RUN/x"])
def test_refused_checkpoint_names_the_option_of_the_command(
    words: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*words.replace("RUN", str(run_dir)).split(), "--checkpoint", "99") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "--checkpoint auto uses the newest checkpoint" in line
    assert "--resume" not in line


@pytest.mark.parametrize("name", ["vocab.txt", "my.model", "dict.txt", "tokenizer.json"])
def test_tokenizer_is_not_written_among_files_that_it_would_remove(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("\n".join(f"line {n} of the text" for n in range(600)))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    words = ("--data.train", tmp_path / "text.txt", "--tokenizer.vocab_size", 300, "--out", tmp_path / "out")
    assert call("tokenizer", "train", *words) == 2
    assert name in capsys.readouterr().err.splitlines()[-1]
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {name: "mine"}


def test_closed_pipe_is_no_error(run_dir: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m lmcore checkpoints {run_dir} | true",
        shell=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_generate_from_run_checkpoint_and_export(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def text(*words: Any) -> str:
        assert call("generate", *words, "--max_tokens", 12, "--device", "cpu") == 0
        return capsys.readouterr().out

    assert call("export", run_dir, "--out", tmp_path / "export") == 0
    assert "logits verified" in capsys.readouterr().out
    newest = text(run_dir, "--prompt", "吾輩は")
    assert newest.startswith("吾輩は")
    assert newest == text(run_dir / "checkpoints" / "step-00000004", "--prompt", "吾輩は")
    assert newest == text(tmp_path / "export", "--prompt", "吾輩は")
    assert text(run_dir, "--checkpoint", "best") == text(run_dir, "--checkpoint", 2)
    two = text(run_dir, "--prompt", "def", "--samples", 2, "--seed", 7)
    assert two == text(run_dir, "--prompt", "def", "--seed", 7) + "\n" + text(
        run_dir, "--prompt", "def", "--seed", 8
    )
    assert text(run_dir, "--greedy") == text(run_dir, "--temperature", 0)
    monkeypatch.setattr(sys, "stdin", io.StringIO("吾輩は"))
    assert text(run_dir, "--prompt", "-") == newest
    assert call("generate", run_dir, "--prompt", "吾輩は" * 200, "--max_tokens", 1, "--device", "cpu") == 0
    assert "the model sees its last 17: its context is full" in capsys.readouterr().err
    assert call("generate", run_dir, "--temperature", -1, "--device", "cpu") == 2
    said = capsys.readouterr()
    assert (said.out, "temperature must be 0 or more (got -1.0)" in said.err) == ("", True)


def test_generate_reads_prompts_from_a_file(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def text(*words: Any) -> str:
        assert call("generate", run_dir, "--max_tokens", 5, "--device", "cpu", *words) == 0
        return capsys.readouterr().out

    (tmp_path / "prompts.txt").write_text("def\n\n吾輩は\n", encoding="utf-8")
    (tmp_path / "prompts.jsonl").write_text('"def"\n{"prompt": "吾輩は", "id": 3}\n', encoding="utf-8")
    expected = text("--prompt", "def") + "\n" + text("--prompt", "吾輩は")
    assert text("--prompts", tmp_path / "prompts.txt") == expected
    assert text("--prompts", tmp_path / "prompts.jsonl") == expected
    (tmp_path / "windows.txt").write_bytes("\ufeffdef\r\n吾輩は\r\n".encode())
    assert text("--prompts", tmp_path / "windows.txt") == expected
    (tmp_path / "windows.jsonl").write_bytes('\ufeff"def"\r\n"吾輩は"\r\n'.encode())
    assert text("--prompts", tmp_path / "windows.jsonl") == expected
    (tmp_path / "one.jsonl").write_text('"a\u2028b\x0c"\n'.replace("\x0c", "\\f"), encoding="utf-8")
    (tmp_path / "one.txt").write_text("a\x0cb\u2028c\n", encoding="utf-8")
    for name in ("one.jsonl", "one.txt"):  # one prompt each: such characters end no line
        assert saved._prompts_of_file(str(tmp_path / name))[1:] == []
    (tmp_path / "bad.jsonl").write_text('"def"\n[1]\n')
    (tmp_path / "empty.txt").write_text("\n")
    for words, said in (
        (["--prompts", tmp_path / "bad.jsonl"], "bad.jsonl, line 2: write a JSON string"),
        (["--prompts", tmp_path / "empty.txt"], "no prompts"),
        (["--prompts", tmp_path / "missing.txt"], "No such file"),
        (["--prompts", tmp_path / "prompts.txt", "--prompt", "x"], "exclude one another"),
        (["--prompt", "x", "--samples", 0], "--samples must be 1 or more"),
        (["--prompt", "x", "--device", "cuda:99"], "device cuda:99"),
        (["--prompt", "x", "--temperature", "nan"], "temperature must be 0 or more"),
        (["--prompt", "x", "--repetition_penalty", 0], "repetition_penalty must be above 0"),
    ):
        assert call("generate", run_dir, *words) == 2
        assert said in capsys.readouterr().err


def test_wrong_line_of_a_file_of_prompts_is_named_by_its_number(tmp_path: Path) -> None:
    """Also behind empty lines."""
    (tmp_path / "a.jsonl").write_text('"def"\n\n\n{bad\n')
    with pytest.raises(RequestError, match="line 4: not JSON"):
        saved._prompts_of_file(str(tmp_path / "a.jsonl"))


def test_generate_asks_for_prompts_in_a_loop(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("--max_tokens", 5, "--device", "cpu")
    expected = ""
    for prompt in ("def", "a\nb"):
        assert call("generate", run_dir, "--prompt", prompt, *settings) == 0
        expected += capsys.readouterr().out.removeprefix(prompt)
    monkeypatch.setattr(sys, "stdin", io.StringIO("def\na\\nb\n"))
    assert call("generate", run_dir, "--interactive", *settings) == 0
    said = capsys.readouterr()
    assert said.out == expected
    assert said.err.count("> ") == 3, "it asks until the input ends"


def test_generate_reads_bytes_that_are_not_utf8(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9\n")
    base = [sys.executable, "-m", "lmcore", "generate", str(run_dir), "--max_tokens", "3", "--device", "cpu"]
    for words, stdin in (
        ([b"--prompt", b"caf\xe9"], b""),
        (["--prompts", str(tmp_path / "latin1.txt")], b""),
    ):
        done = subprocess.run([*base, *words], capture_output=True, cwd=ROOT, input=stdin)
        assert done.returncode == 0, done.stderr
        assert done.stdout.decode().startswith("caf\N{REPLACEMENT CHARACTER}")
        assert b"not valid UTF-8" in done.stderr


def test_generate_shows_no_escape_codes(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "lmcore.saved.generate.stream", lambda *_, **__: iter(["a\x1b]0;title\x07", "\x9b2Jb\n\tc"])
    )
    assert call("generate", run_dir, "--prompt", "x\x1b[2J", "--device", "cpu") == 0
    shown = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\x9b"} & set(shown)
    assert "b\n\tc" in shown, "line ends and tabs are text"


def test_generate_prompt_may_begin_with_dashes(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for prompt in ("--x", "-x", "- x"):
        assert call("generate", run_dir, "--prompt", prompt, "--max_tokens", 2, "--device", "cpu") == 0
        assert capsys.readouterr().out.startswith(prompt)


def test_evaluate_is_the_mean_over_every_token_of_every_set(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("def f(x):\n\n吾輩は猫である。\n\n" * 9, encoding="utf-8")
    (tmp_path / "b.txt").write_text("x\n", encoding="utf-8")
    places = [tmp_path / "a.txt", f"short={tmp_path / 'b.txt'}"]
    assert call("evaluate", run_dir, "--data", *places, "--unit", "paragraph", "--json", "-") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["step"] == 4
    assert set(result["sets"]) == {"a.txt", "short"}
    opened = pytest.importorskip("lmcore.saved.load").load_model(run_dir, device="cpu")
    # By hand: documents, each ended by EOS, in blocks of the context; nothing shifted, nothing padded.
    ids: list[int] = []
    for document in ("def f(x):", "吾輩は猫である。") * 9:
        ids += [*opened.tokenizer.encode(document), opened.tokenizer.eos_id]
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 32):
            piece = torch.tensor([ids[start : start + 33]])
            logits = opened.model(input_ids=piece[:, :-1]).logits[..., : opened.tokenizer.vocab_size]
            labels = piece[0, 1:]
            nats += float(torch.nn.functional.cross_entropy(logits[0].double(), labels, reduction="sum"))
    one = result["sets"]["a.txt"]
    assert one["tokens"] == len(ids) - 1
    assert one["loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
    assert one["perplexity"] == pytest.approx(math.exp(one["loss"]))
    size = 9 * len("def f(x):吾輩は猫である。".encode()) - len(opened.tokenizer.decode(ids[:1]).encode())
    assert one["bytes"] == size, "the bytes of what was predicted: all but the first token"
    assert one["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    out = tmp_path / "result.json"
    assert call("evaluate", run_dir, "--data", *places, "--unit", "paragraph", "--json", out) == 0
    assert "a.txt: loss " in capsys.readouterr().out
    assert json.loads(out.read_text()) == result
    with pytest.raises(RequestError, match="context of 32"):
        score(opened, {"a": [str(tmp_path / "a.txt")]}, block_size=64)


def test_evaluate_leaves_out_the_run_files_of_an_unquoted_glob(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("held.txt", "status.json", "metrics.jsonl", "train.log"):
        (tmp_path / name).write_text("def f(x):\n" * 9)
    expanded = sorted(tmp_path.glob("*"))
    assert call("evaluate", run_dir, "--data", *expanded, "--json", "-") == 0
    said = capsys.readouterr()
    assert list(json.loads(said.out)["sets"]) == ["held.txt"]
    assert f"--data: left out: {tmp_path}, the files of a run" in said.err


def test_evaluate_leaves_out_a_store_of_the_run_beside_the_text(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``--data text/*`` scored the text a second time, as a set named like the store."""
    run, text = tmp_path / "run", tmp_path / "text"
    shutil.copytree(run_dir, run)
    (run / "config.yaml").write_text(f"data:\n  store_dir: {text}\n")
    (text / "held-1").mkdir(parents=True)
    (text / "held.txt").write_text("def f(x):\n" * 9)
    for name in ("manifest.json", "part-00000.bin"):
        (text / "held-1" / name).touch()
    assert call("evaluate", run, "--data", *sorted(text.glob("*")), "--json", "-") == 0
    said = capsys.readouterr()
    assert list(json.loads(said.out)["sets"]) == ["held.txt"]
    assert f"--data: left out: {text / 'held-1'}, a token store of data.store_dir" in said.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_export_that_is_ended_by_a_signal_leaves_nothing(
    number: signal.Signals, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(*_: Any) -> None:
        assert signal.getsignal(number) is not signal.SIG_DFL, "this process would end at once"
        os.kill(os.getpid(), number)

    monkeypatch.setattr("lmcore.saved.export.verify", end)
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as ended:
            call("export", run_dir, "--out", tmp_path / "export")
        assert ended.value.code == 128 + number
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert not list(tmp_path.iterdir())


def test_evaluate_keeps_files_of_one_name_apart(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only names that the user has written join files; a path may hold an equals sign."""
    files = {
        "a/held.txt": "def f(x):\n" * 9,
        "b/held.txt": "吾輩は猫である。\n" * 9,
        "lr=3e-4/held.txt": "x\n" * 9,
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(content, encoding="utf-8")
    one, other, third = (str(tmp_path / name) for name in files)
    assert call("evaluate", run_dir, "--data", one, other, third, "--json", "-") == 0
    sets = json.loads(capsys.readouterr().out)["sets"]
    assert list(sets) == ["held.txt", other, third]
    assert call("evaluate", run_dir, "--data", f"both={one}", f"both={other}", "--json", "-") == 0
    both = json.loads(capsys.readouterr().out)["sets"]
    assert list(both) == ["both"]
    assert both["both"]["bytes"] > sets["held.txt"]["bytes"]


def test_options_that_would_be_ignored_are_refused(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("export", run_dir, "--out", tmp_path / "export") == 0
    step = run_dir / "checkpoints" / "step-00000004"
    capsys.readouterr()
    for words, said in (
        (
            ["generate", tmp_path / "export", "--prompt", "x", "--checkpoint", 2],
            "is one export: checkpoint 2",
        ),
        (["generate", step, "--prompt", "x", "--checkpoint", "best"], "is one checkpoint: checkpoint best"),
        (["export", tmp_path / "export", "--push", "me/m", "--dtype", "bf16"], "--dtype: "),
        (["export", tmp_path / "export", "--push", "me/m", "--out", "x"], "--out: "),
        (["export", run_dir, "--public"], "give --push OWNER/NAME"),
    ):
        assert call(*words) == 2, words
        assert said in capsys.readouterr().err, words


def test_checkpoints_lists_and_verifies(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("checkpoints", run_dir, "--verify") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["step-00000002", "step-00000004"]
    assert "validation loss 4.0000" in lines[0]
    assert all("verified" in line for line in lines)
    assert call("checkpoints", run_dir, "--json") == 0
    assert [row["step"] for row in json.loads(capsys.readouterr().out)] == [2, 4]


def test_data_commands_read_the_text_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("\n".join(f"line {n} of the text" for n in range(600)))
    common = ["--data.train", "text.txt", "--data.valid_fraction", "0.1", "--data.block_size", "16",
              "--data.unit", "line", "--run_dir", "runs/x", "--model.config.n_positions", "32"]  # fmt: skip
    assert call("inspect", "--tokenizer.vocab_size", "300", *common) == 0
    said = capsys.readouterr().out
    assert re.search(r"  tokens +[\d,]+, 0\.\d+ a byte", said), "before anything is trained"
    assert "a tokenizer of 300 pieces that was trained on 4 MB of this text at most, for this count" in said
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"], "inspect writes nothing"
    assert call("tokenizer", "train", "--tokenizer.vocab_size", "300", *common) == 0
    assert "runs/x/tokenizer: 300 pieces" in capsys.readouterr().out
    assert call("tokenizer", "train", "--out", "runs/x/tokenizer", *common) == 2
    assert "already contains a tokenizer" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    trained: list[Any] = []
    with monkeypatch.context() as patched:
        patched.setattr("lmcore.run.setup.train_tokenizer", lambda *words, **options: trained.append(words))
        for words, refusal in {
            ("--out", "file"): "file is not a folder",
            ("--out", "file/new"): "file is not a folder",
            ("--out", "link"): "link is not a folder",
            ("--out", ""): "--out must not be empty",
            ("--out=",): "--out must not be empty",
            ("--out", "new", "--tokenizer.path", "runs/x/tokenizer"): "give --tokenizer.vocab_size",
        }.items():
            assert call("tokenizer", "train", *words, *common) == 2, words
            assert refusal in capsys.readouterr().err, "before the training, which takes minutes"
        patched.setattr("os.access", lambda path, mode: mode == os.R_OK)
        assert call("tokenizer", "train", "--out", "new/folder", *common) == 2
        assert "this user may not write into" in capsys.readouterr().err
    assert not trained
    assert not (tmp_path / "new").exists()
    assert call("inspect", *common) == 0
    said = capsys.readouterr().out
    assert "600" in said
    assert "sample" in said
    assert "round trip" in said
    # Each time instead of twice a minute
    monkeypatch.setattr("lmcore.report.console.PLAIN_TASK_SECONDS", 0.0)
    assert call("prepare", *common) == 0
    said, progress = capsys.readouterr()
    assert re.search(
        r"tokenizing: [\d.,kM]+/[\d.,kM]+ bytes \d+%, .*\d documents, [\d,]+ tokens, \d:", progress
    )
    assert "validation (valid)" in said
    assert "blocks in an epoch" in said
    assert list((tmp_path / "token_stores").glob("*/manifest.json"))


def test_plan_prints_parameters_batch_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = [
        "--model.type",
        "gpt2",
        "--model.config.n_layer",
        "2",
        "--model.config.n_embd",
        "64",
        "--model.config.n_head",
        "2",
    ]
    common = [*model, "--tokenizer.vocab_size", "640", "--train.duration", "10 steps", "--data.block_size", "64",
              "--model.config.n_positions", "64", "--train.global_batch_blocks", "8",
              "--train.micro_batch_blocks", "4"]  # fmt: skip
    assert call("plan", *common, "--processes", 2, "--strategy", "fsdp2", "--tokens_per_second", 100) == 0
    said = capsys.readouterr().out
    total = 640 * 64 + 64 * 64 + 2 * (12 * 64 * 64 + 13 * 64) + 2 * 64
    assert f"{total:,} (" in said
    assert "2 x 1 x 4 x 64" in said
    assert "= 512 tokens" in said
    assert "0:00:51 at 100 tokens/s" in said
    assert call("plan", *common, "--device_gib", "0.001") == 0
    assert "does not fit" in capsys.readouterr().out
    assert call("plan", *common, "--strategy", "fsdp3") == 2
    assert "fsdp3" in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_doctor_names_an_accelerate_configuration_that_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    answers = tmp_path / "accelerate" / "default_config.yaml"
    answers.parent.mkdir()
    answers.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\n")
    assert [one.state for one in doctor.examine() if one.name == "accelerate config"] == ["note"]
    answers.write_text(answers.read_text() + "gradient_accumulation_steps: 4\n")
    _, found = [one for one in doctor.examine() if one.name == "accelerate config"]
    assert found.state == "warn"
    assert "gradient_accumulation_steps" in found.value
    assert f"remove {answers}" in found.remedy


@pytest.mark.parametrize(
    ("limits", "remedy"), [((256, 4096), "ulimit -n 4096"), ((256, 256), "the hard limit is no higher")]
)
def test_doctor_says_how_more_files_can_be_open(
    limits: tuple[int, int], remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda which: limits)
    (found,) = (one for one in doctor._limits(Path()) if one.name == "open files")
    assert found.remedy.startswith(remedy)


def test_doctor_names_the_remedy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("doctor", "--json") in (0, 1)
    found = json.loads(capsys.readouterr().out)
    names = {one["name"] for one in found}
    assert {"python", "torch", "transformers", "disk", "open files", "memory", "cores"} <= names
    assert not [one for one in found if "could not be checked" in one["value"]]
    assert all(one["remedy"] for one in found if one["state"] in ("warn", "bad"))

    def old(package: str) -> str:
        return "2.6.0" if package == "torch" else "99"

    monkeypatch.setattr(doctor, "version", old)
    found_now = doctor.examine()

    def none(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(doctor, "version", none)
    missing = {one.name: one for one in doctor.examine()}
    assert missing["torch"].state == "bad"
    assert missing["deepspeed"].state == "note", "an extra, which only ZeRO needs"
    assert "lmcore[deepspeed]" in missing["deepspeed"].remedy
    assert [one.state for one in found_now if one.name == "torch"] == ["bad"]
    assert "pip install -U torch" in next(one.remedy for one in found_now if one.name == "torch")
    assert [one.state for one in found_now if one.name == "transformers"] == ["ok"]

    class Small:
        free, f_files, f_favail = 1 << 30, 100_000, 12

    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: Small)
    monkeypatch.setattr(doctor.os, "statvfs", lambda place: Small)
    states = {one.name: one.state for one in doctor.examine()}
    assert (states["disk"], states["files"]) == ("warn", "warn")

    def broken(folder: Path) -> Any:
        raise OSError("no such thing here")
        yield

    monkeypatch.setattr(doctor, "_memory", broken)
    monkeypatch.setattr(doctor.examine, "__defaults__", (".",))
    said = [one.line() for one in doctor.examine()]
    assert any("could not be checked: OSError" in line for line in said), "the other checks still count"
    assert len(said) > 8
