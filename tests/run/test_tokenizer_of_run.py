"""Which tokenizer a run uses: nothing is trusted because it exists, and nothing is made that was not asked for."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmcore.config import parse
from lmcore.config.curves import Curve
from lmcore.data.store.inventory import list_stores
from lmcore.data.tokenizer.tokenizer import load_tokenizer
from lmcore.data.tokenizer.training import train_tokenizer
from lmcore.errors import RequestError
from lmcore.run import dev_run, setup

TEXT = "".join(f"the {number}th line of the text, with {number * 7} words\n\n" for number in range(400))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def config_of(tmp_path: Path, **options: Any) -> Any:
    given = {
        "data__train": tmp_path / "text.txt",
        "data__block_size": 32,
        "data__store_dir": tmp_path / "stores",
        "data__processes": 1,
        "tokenizer__vocab_size": 320,
        "run_dir": tmp_path / "run",
        **options,
    }
    words = [word for name, value in given.items() for word in (f"--{name.replace('__', '.')}", str(value))]
    return parse.parse(words)


def opened(tmp_path: Path, **options: Any) -> tuple[Any, list[str]]:
    """The data of a start of this configuration, and what was said about the tokenizer."""
    notes: list[str] = []
    home = tmp_path / "run" / "tokenizer"
    data = setup.open_data(config_of(tmp_path, **options), home, note=notes.append)
    return data, [line for line in notes if line.startswith("tokenizer: ")]


@pytest.mark.parametrize("mode", ["store", "stream"])
def test_text_that_the_tokenizer_does_not_know_is_said(mode: str, tmp_path: Path, text: Path) -> None:
    """It was lost without a word: every Japanese character became <unk>, and the run trained on that."""
    options = {"byte_fallback": False, "add_dummy_prefix": True, "normalization_rule_name": "nmt_nfkc_cf"}
    train_tokenizer([TEXT], vocab_size=100, folder=tmp_path / "english", character_coverage=1.0, **options)
    notes: list[str] = []
    given: dict[str, Any] = {"tokenizer__path": tmp_path / "english", "data__mode": mode}
    given |= {"train__duration": "4 steps", "tokenizer__vocab_size": "null"}
    for content in (
        TEXT.upper().replace(" ", "  "),
        "the text 吾輩は猫である。\n" * 400,
    ):  # normalized is not lost
        text.write_text(content)
        (tmp_path / "held.txt").write_text(TEXT)
        config = config_of(tmp_path, data__valid=tmp_path / "held.txt", **given)
        notes.append("")
        setup.open_data(config, tmp_path / "run" / "tokenizer", note=notes.append)
    [line] = [line for line in notes if "does not know" in line]
    assert notes.index(line) > notes.index("", 1)
    assert "53.3% of the characters of 'text'" in line
    assert "give another one with --tokenizer.path, or none" in line


def test_tokens_of_which_nothing_is_held_out_are_said(tmp_path: Path, text: Path) -> None:
    """data.valid_fraction did nothing, and the run had no validation set."""
    train_tokenizer([TEXT], vocab_size=320, folder=tmp_path / "given")
    (np.arange(3000, dtype="<u2") % 300).astype("<u2").tofile(tmp_path / "a.bin")
    options = {"tokenizer__path": tmp_path / "given", "tokenizer__vocab_size": "null"}
    for fraction, words in ((0.1, 1), (0, 0)):
        notes: list[str] = []
        config = config_of(tmp_path, **options, data__train=tmp_path / "a.bin", data__valid_fraction=fraction)
        setup.open_data(config, tmp_path / "run" / "tokenizer", note=notes.append)
        assert sum("source 'a' is tokens, of which data.valid_fraction" in line for line in notes) == words


def a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "step-00000002").mkdir(parents=True)


def test_unchanged_start_uses_the_existing_tokenizer(tmp_path: Path, text: Path) -> None:
    data, notes = opened(tmp_path)
    assert "trained on" in notes[0]
    again, notes = opened(tmp_path)
    assert notes == []
    assert again.encoder.fingerprint == data.encoder.fingerprint
    text.rename(tmp_path / "moved.txt")
    (tmp_path / "moved.txt").rename(text)
    assert opened(tmp_path)[1] == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tokenizer__vocab_size": 330}, "tokenizer.vocab_size 320 -> 330"),
        ({"tokenizer__model_type": "char"}, "tokenizer.model_type 'bpe' -> 'char'"),
        ({"tokenizer__user_symbols": '["<x>"]'}, "tokenizer.user_symbols [] -> ['<x>']"),
        ({"data__valid_fraction": 0.3}, "data.valid_fraction"),
        ({"tokenizer__sample_bytes": 5000}, "tokenizer.sample_bytes 100000000 -> 5000"),
        ({"resume": "never", "tokenizer__vocab_size": 330}, "tokenizer.vocab_size 320 -> 330"),
    ],
)
@pytest.mark.usefixtures("text")
def test_tokenizer_of_other_options_is_replaced(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    first, _ = opened(tmp_path)
    if "resume" in options:
        a_checkpoint(tmp_path)
    second, notes = opened(tmp_path, **options)
    assert "is replaced" in notes[0]
    assert reason in notes[0]
    assert "trained on" in notes[1]
    if "data__valid_fraction" not in options and "tokenizer__sample_bytes" not in options:
        assert second.encoder.fingerprint != first.encoder.fingerprint


def test_tokenizer_of_other_text_is_replaced(tmp_path: Path, text: Path) -> None:
    opened(tmp_path)
    text.write_text(TEXT.replace("line", "LINE"))
    assert "is replaced: other text" in opened(tmp_path)[1][0]


@pytest.mark.usefixtures("text")
def test_fast_dev_run_leaves_nothing_for_a_later_run(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    folder = tmp_path / "run"
    dev_run.write_sample(config, folder)
    setup.open_data(dev_run.shortened(config, folder), folder / "tokenizer", note=lambda line: None)
    assert "is replaced" in opened(tmp_path)[1][0]


def test_fast_dev_run_reads_text_in_any_encoding(tmp_path: Path, text: Path) -> None:
    """The sample is UTF-8, whatever the text is."""
    text.write_bytes("日本語の文章、二行。\n".encode("cp932") * 400)
    config = config_of(tmp_path, data__encoding="cp932")
    folder = tmp_path / "run"
    dev_run.write_sample(config, folder)
    data = setup.open_data(dev_run.shortened(config, folder), folder / "tokenizer", note=lambda line: None)
    assert "日本語" in data.encoder.decode(data.train.read(np.array([0])).ids[0].tolist())


@pytest.mark.usefixtures("text")
@pytest.mark.parametrize(
    ("argv", "shares"),
    [
        (["--optim.warmup", "10 steps", "--train.duration", "100 steps"], ["10%"]),
        (["--optim.warmup", "5120 tokens", "--train.duration", "100 steps"], ["10%"]),
        (["--optim.warmup", "10 steps", "--train.duration", "51200 tokens"], ["10%"]),
        (["--optim.warmup", "1 epochs", "--train.duration", "4 epochs"], ["25%"]),
        (["--optim.warmup", "1 epochs", "--train.duration", "100 steps"], ["1 epochs"]),
        (["--optim.schedule", "0: 0, 10: 1, 50 steps: 1, 100%: 0", "--train.duration", "100 steps"],
         ["0 steps", "10%", "50%", "100%"]),
        (["--optim.schedule", "0: 0, 10: 1, 200 steps: 1, 400 steps: 0", "--train.duration", "100 steps"],
         ["0 steps", "10%", "100%"]),
    ],
)  # fmt: skip
def test_fast_dev_run_keeps_the_shape_of_the_schedule(
    tmp_path: Path, argv: list[str], shares: list[str]
) -> None:
    given = {name.removeprefix("--").replace(".", "__"): value for name, value in zip(argv[::2], argv[1::2])}
    config = config_of(tmp_path, train__global_batch_blocks=16, **given)
    short = dev_run.shortened(config, tmp_path / "run").optim
    if isinstance(short.schedule, Curve):
        assert [str(place) for place, _ in short.schedule.points] == shares
    else:
        assert [str(short.warmup)] == shares


@pytest.mark.usefixtures("text")
def test_tokenizer_of_unknown_origin_is_replaced(tmp_path: Path) -> None:
    home = tmp_path / "run" / "tokenizer"
    train_tokenizer([TEXT], vocab_size=320, folder=home)
    assert "what it was made of is not known" in opened(tmp_path)[1][0]
    (home / "tokenizer.model").write_bytes(b"damaged")
    assert "is replaced" in opened(tmp_path)[1][0]
    (home / "lmcore_tokenizer.json").unlink()  # as a kill while saving leaves it
    assert "is replaced" in opened(tmp_path)[1][0]
    assert opened(tmp_path)[1] == []


def test_resumed_run_keeps_the_tokenizer_of_its_checkpoints(tmp_path: Path, text: Path) -> None:
    first, _ = opened(tmp_path)
    a_checkpoint(tmp_path)
    text.write_text(TEXT + "appended\n")
    again, notes = opened(tmp_path)
    assert again.encoder.fingerprint == first.encoder.fingerprint
    assert "of the checkpoints here is used" in notes[0]


@pytest.mark.usefixtures("text")
def test_run_records_which_stores_it_uses(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    opened(tmp_path, data__valid_fraction=0.2)
    found = list_stores(tmp_path / "stores", runs=[tmp_path])
    assert [store.used_by for store in found] == [(tmp_path / "run",)] * 2


@pytest.mark.usefixtures("text")
def test_stream_builds_no_token_store(tmp_path: Path) -> None:
    data, _ = opened(tmp_path, data__mode="stream", data__valid_fraction=0, train__duration="4 steps")
    assert data.valid == {}
    assert not (tmp_path / "stores").exists()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """An exported model of another vocabulary, with its tokenizer."""
    from transformers import GPT2Config

    folder = tmp_path / "weights"
    GPT2Config(vocab_size=300, n_positions=64, n_embd=8, n_layer=1, n_head=1).save_pretrained(folder)
    train_tokenizer([TEXT], vocab_size=300, folder=folder)
    return folder


PRETRAINED = {"model__type": "null"}


@pytest.mark.usefixtures("text")
def test_pretrained_weights_bring_their_own_tokenizer(tmp_path: Path, weights: Path) -> None:
    data, notes = opened(tmp_path, model__from_pretrained=weights, **PRETRAINED)
    assert data.encoder.fingerprint == load_tokenizer(weights).fingerprint
    assert f"that of {weights}" in notes[0]
    data, notes = opened(tmp_path, model__from_pretrained=weights, tokenizer__train="true", **PRETRAINED)
    assert data.encoder.vocab_size == 320


@pytest.mark.usefixtures("text")
def test_resumed_run_of_pretrained_weights_uses_its_copy_without_a_warning(
    tmp_path: Path, weights: Path
) -> None:
    options = {"model__from_pretrained": weights, "tokenizer__vocab_size": "null", **PRETRAINED}
    first, _ = opened(tmp_path, **options)
    setup.keep_tokenizer(tmp_path / "run" / "tokenizer", first, note=print)
    a_checkpoint(tmp_path)
    for file in weights.glob("*tokenizer*"):  # a resume does not read them
        file.unlink()
    again, notes = opened(tmp_path, **options)
    assert (again.encoder.fingerprint, notes) == (first.encoder.fingerprint, [])


@pytest.mark.usefixtures("text")
def test_another_tokenizer_for_pretrained_weights_is_said(tmp_path: Path, weights: Path) -> None:
    train_tokenizer([TEXT], vocab_size=290, folder=tmp_path / "other")
    options = {"model__from_pretrained": weights, "tokenizer__vocab_size": "null", **PRETRAINED}
    _, notes = opened(tmp_path, tokenizer__path=tmp_path / "other", **options)
    assert "is not the tokenizer of" in notes[0]
    assert opened(tmp_path, tokenizer__path=weights, **options)[1] == []


@pytest.mark.usefixtures("text")
def test_pretrained_weights_without_a_tokenizer_are_refused(tmp_path: Path, weights: Path) -> None:
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "lmcore_tokenizer.json"):
        (weights / name).unlink()
    with pytest.raises(
        RequestError, match=r"comes without its tokenizer .*tokenizer\.path.*tokenizer\.train true"
    ):
        opened(tmp_path, model__from_pretrained=weights, **PRETRAINED)


def test_source_below_one_block_is_said(tmp_path: Path, text: Path) -> None:
    """Nothing of it is trained on, and the start table shows its tokens."""
    (tmp_path / "tiny.txt").write_text("a few words\n")
    notes: list[str] = []
    sources = f"[{{path: {text}}}, {{path: {tmp_path / 'tiny.txt'}}}]"
    config = config_of(tmp_path, data__train=sources, data__valid_fraction=0)
    data = setup.open_data(config, tmp_path / "run" / "tokenizer", note=notes.append)
    [said] = [line for line in notes if "not one block of 32" in line]
    assert said.startswith(f"source 'tiny' has {data.train.stores[1].n_tokens} tokens")


@pytest.mark.usefixtures("text")
def test_folder_of_stores_that_cannot_be_written_is_refused_before_the_tokenizer_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for one with stores in it: those of this text may be there."""
    with pytest.raises(RequestError, match=r"--data\.store_dir .*text\.txt is not a folder"):
        opened(tmp_path, data__store_dir=tmp_path / "text.txt" / "stores")
    stores = tmp_path / "stores"
    with monkeypatch.context() as patched:  # root may write everywhere
        patched.setattr("os.access", lambda path, mode: not Path(path).is_relative_to(stores))
        with pytest.raises(RequestError, match=r"--data\.store_dir .* may not write"):
            opened(tmp_path)
    assert not (tmp_path / "run" / "tokenizer").exists()
    blocks = opened(tmp_path)[0].train.epoch_blocks
    shutil.rmtree(tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr("os.access", lambda path, mode: not Path(path).is_relative_to(stores))
        assert opened(tmp_path)[0].train.epoch_blocks == blocks
