"""Tokenizer: nothing is lost, nothing is found that was not there, and transformers sees the same ids."""

from __future__ import annotations

import gzip
import io
import json
import logging
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcore.data.corpus import Reading, sample_texts, source_changes, tokenizer_source
from lmcore.data.text.documents import Source, resolve_sources
from lmcore.data.tokenizer import huggingface, tokenizer, training, word_cache
from lmcore.data.tokenizer.huggingface import TEST_TEXTS
from lmcore.data.tokenizer.tokenizer import (
    SentencePieceTokenizer,
    check_tokenizer,
    load_tokenizer,
)
from lmcore.data.tokenizer.training import train_tokenizer
from lmcore.errors import RequestError

NEKO = """吾輩は猫である。名前はまだ無い。
　どこで生れたかとんと見当がつかぬ。何でも薄暗いじめじめした所でニャーニャー泣いていた事だけは記憶している。
吾輩はここで始めて人間というものを見た。しかもあとで聞くとそれは書生という人間中で一番獰悪な種族であったそうだ。
この書生というのは時々我々を捕えて煮て食うという話である。しかしその当時は何という考もなかったから別段恐しいとも思わなかった。
ただ彼の掌に載せられてスーと持ち上げられた時何だかフワフワした感じがあったばかりである。
"""
"""夏目漱石『吾輩は猫である』(1905), public domain."""
CODE = Path(__file__).read_text(encoding="utf-8").replace("▁", "_")
CORPUS = [NEKO, NEKO.replace("。", "。\n"), CODE, "ＡＢＣ　１２３ ｶﾞｷﾞ 3.14\t2 ** 10\n" * 20]

# Any text, with what is interesting more often than chance would have it.
ANY_TEXT = st.lists(
    st.one_of(
        st.text(max_size=12),
        st.sampled_from(
            [*NEKO.split("。"), *CODE.splitlines()[:60], *TEST_TEXTS, "\n\n", "    ", "\0", "</s>", "<pad>"]
        ),
    ),
    max_size=8,
).map(lambda parts: "".join(parts).encode("utf-8", "ignore").decode().replace("▁", "_"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizers") / "bpe"
    train_tokenizer(CORPUS, vocab_size=900, folder=path, model_max_length=128)
    return path


@pytest.fixture(scope="session")
def ours(folder: Path) -> SentencePieceTokenizer:
    opened = load_tokenizer(folder)
    assert isinstance(opened, SentencePieceTokenizer)
    return opened


@pytest.fixture(scope="session")
def hub(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


# --- the laws of our own tokenizer ---


@settings(max_examples=300, deadline=None)
@given(text=ANY_TEXT)
def test_every_text_comes_back_and_transformers_agrees(
    ours: SentencePieceTokenizer, hub: Any, text: str
) -> None:
    ids = ours.encode(text)
    assert ours.decode(ids) == text
    assert hub(text)["input_ids"] == ids
    assert hub.decode(ids) == text
    lengths = ours.byte_lengths()
    assert lengths is not None
    assert lengths[ids].sum() == len(text.encode())


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(ANY_TEXT, max_size=4), size=st.integers(1, 9))
def test_long_text_is_split_without_changing_its_ids(
    ours: SentencePieceTokenizer, texts: list[str], size: int
) -> None:
    whole = [ours.processor.encode(text) for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "_CUT_CHARACTERS", size)
        pieces = [list(ours._cut(text)) for text in texts]
        assert [ids.tolist() for ids in ours.encode_batch(texts)] == whole
        assert [ids.tolist() for ids in ours.encode_batch(texts, threads=2)] == whole
    assert ["".join(one) for one in pieces] == texts


@settings(max_examples=300, deadline=None)
@given(text=ANY_TEXT | st.text(st.sampled_from("aB猫é１2_ ,\n\t(ー\u3099"), max_size=30))
def test_whether_words_are_cut_depends_on_two_characters(text: str) -> None:
    for words in word_cache._WORDS:
        found = words.findall(text)
        assert "".join(found) == text
        cuts = set(np.cumsum([len(word) for word in found]).tolist()) - {len(text)}
        assert cuts == {at for at in range(1, len(text)) if not words.fullmatch(text[at - 1 : at + 1])}
        if text.isascii():
            assert re.compile(words.pattern, re.ASCII).findall(text) == found


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(ANY_TEXT, max_size=5))
def test_word_cache_gives_the_ids_of_the_whole_text(ours: SentencePieceTokenizer, texts: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # So small that words are forgotten, and looking them up is given up and tried again, within a few texts.
        for name, value in (("GROUP", 50), ("KEPT", 300), ("CALL", 20), ("TRIAL", 100), ("REST", 100)):
            patch.setattr(word_cache, f"_{name}_CHARACTERS", value)
        for _ in range(2):
            assert [one.tolist() for one in ours.encode_batch(texts)] == [
                ours.processor.encode(t) for t in texts
            ]


@pytest.mark.parametrize(
    ("options", "way"),
    [
        ({}, 0),
        ({"split_digits": False}, 1),
        ({"user_symbols": ["a1"]}, 2),
        ({"split_by_whitespace": False}, None),
        ({"user_symbols": ["\n\n"]}, None),
    ],
)
def test_no_vocabulary_piece_is_split(options: dict[str, Any], way: int | None) -> None:
    made = train_tokenizer([*CORPUS, "100 200 1000 2000\n" * 40], vocab_size=900, **options)
    assert (made._words._words if made._words else None) == (None if way is None else word_cache._WORDS[way])
    texts = [*CORPUS, *TEST_TEXTS, "a1 a b\n\na b1 2000\n\n\n"]
    assert [one.tolist() for one in made.encode_batch(texts)] == [
        made.processor.encode(text) for text in texts
    ]


def test_word_cache_is_bounded_and_pauses_where_it_does_not_pay(
    ours: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = pickle.loads(pickle.dumps(ours))
    monkeypatch.setattr(word_cache, "_KEPT_CHARACTERS", 2000)
    rng = np.random.default_rng(1)
    made.encode_batch([CODE] * 20)
    assert made._words._rest <= 0  # the same text again: it pays
    noise = ["".join(map(chr, rng.integers(0x4E00, 0x6000, 2000))) for _ in range(200)]
    for one in noise:
        assert made.encode(one) == ours.processor.encode(one)
        assert sum(map(len, made._words._ids)) <= 2000 + 2001
    assert made._words._rest > 0


def test_long_texts_are_cut_into_bounded_pieces(
    ours: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = NEKO * 200
    assert max(map(len, ours._cut(long))) < 4200
    assert ours.encode(long) == ours.processor.encode(long)
    # A run in which every pair of characters stands in some piece has no provable cut: it is cut in the end.
    monkeypatch.setattr(tokenizer, "_LONGEST_CHARACTERS", 10_000)
    run = " " * 50_000
    assert max(map(len, ours._cut(run))) <= 10_000
    assert ours.decode(ours.encode(run)) == run


def test_control_strings_in_a_text_are_text(ours: SentencePieceTokenizer, hub: Any) -> None:
    text = "<s>本文</s><pad><unk>"
    assert not set(ours.encode(text)) & set(ours.special_ids.values())
    assert hub.encode(text) == ours.encode(text)
    assert ours.decode([ours.eos_id]) == ""


def test_special_ids(ours: SentencePieceTokenizer, hub: Any) -> None:
    assert ours.special_ids == {"bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0, "pad_token_id": 3}
    assert (ours.eos_id, ours.bos_id, ours.pad_id, ours.unk_id) == (2, 1, 3, 0)
    assert {
        f"{k}_id": getattr(hub, f"{k}_id") for k in ("bos_token", "eos_token", "unk_token", "pad_token")
    } == ours.special_ids
    assert (hub.eos_token, hub.pad_token, len(hub)) == ("</s>", "<pad>", ours.vocab_size)
    assert hub.model_max_length == 128
    assert hub("猫")["input_ids"] == hub.encode("猫", add_special_tokens=True)  # no BOS, no EOS of its own


def test_characters_that_sentencepiece_usually_loses(ours: SentencePieceTokenizer) -> None:
    """Full-width forms, half-width kana, double spaces, line ends and characters it has never seen."""
    for text in TEST_TEXTS:
        assert ours.decode(ours.encode(text)) == text
    assert ours.encode("ＡＢＣ") != ours.encode("ABC")
    assert ours.encode("ｶﾞ") != ours.encode("ガ")
    assert len(ours.encode("2026")) == 4  # digits one by one
    assert ours.encode("a\nb") == [*ours.encode("a"), *ours.encode("\n"), *ours.encode("b")]
    assert len(ours.encode("吾輩は猫である。")) < 8  # no spaces needed
    assert ours.decode(ours.encode("▁")) == " "  # the one loss that every SentencePiece model has


def test_ids_fit_and_are_int32(ours: SentencePieceTokenizer) -> None:
    arrays = ours.encode_batch([CODE, "", NEKO])
    assert [a.dtype for a in arrays] == [np.int32] * 3
    assert arrays[1].shape == (0,)
    assert max(int(a.max()) for a in arrays if len(a)) < ours.vocab_size == len(ours)
    assert ours.encode_batch([]) == []


def test_tokenizers_can_be_pickled(ours: SentencePieceTokenizer) -> None:
    other = pickle.loads(pickle.dumps(ours))
    assert other.fingerprint == ours.fingerprint
    assert other.encode(NEKO) == ours.encode(NEKO)


# --- training ---


def test_unigram_ties_are_broken_alike_in_transformers(tmp_path: Path) -> None:
    """Runs of one character can be cut in several ways of the same score; rounding of the sums must not decide. And the name
    of a special piece is text in a text."""
    from transformers import AutoTokenizer

    made = train_tokenizer(CORPUS, vocab_size=700, model_type="unigram", folder=tmp_path)
    texts = [*CODE.split("\n"), *(unit * n for unit in (" ", "-", "は", " =", "な。") for n in range(1, 60))]
    texts += [*TEST_TEXTS, "</s>", "a<s></s>b<unk><pad><0x41>", "<</s>>", "</p></s", "日</s>本"]
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    differ = [text for text in texts if made.encode(text) != theirs.encode(text, add_special_tokens=False)]
    assert not differ
    assert [made.decode(made.encode(text)) for text in texts] == texts
    assert not any("not the same as here" in note for note in made.notes)


def test_training_is_deterministic(ours: SentencePieceTokenizer) -> None:
    again = train_tokenizer(CORPUS, vocab_size=900, seed=5)
    assert again.files[tokenizer.MODEL_FILE] == ours.files[tokenizer.MODEL_FILE]
    assert again.fingerprint == ours.fingerprint
    assert train_tokenizer(CORPUS, vocab_size=901).fingerprint != ours.fingerprint
    program = (
        "import json, sys; from lmcore.data.tokenizer.training import train_tokenizer\n"
        "print(train_tokenizer(json.load(sys.stdin), vocab_size=900).fingerprint)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(CORPUS),
        capture_output=True,
        text=True,
        check=True,
        env={"OMP_NUM_THREADS": "2"},
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.strip() == ours.fingerprint


def test_long_line_is_kept_in_training() -> None:
    filler = "".join(chr(0x4E00 + n % 500) for n in range(20_000))  # 60 kB without a line end
    line = filler + "深山幽谷" * 300 + filler
    trained = train_tokenizer([line, "short\n" * 50], vocab_size=1500)
    assert trained.encode("深山幽谷") == [trained.processor.piece_to_id("深山幽谷")]
    assert any("cut 1 line of more than 16,384 bytes, none was left out" in note for note in trained.notes)
    record = json.loads(trained.files[tokenizer.RECORD_FILE])
    assert (record["documents"], record["lines"], record["cut_lines"]) == (2, 51, 1)
    assert record["bytes"] == len(line.encode()) + 250


def test_reserved_characters_do_not_drop_their_line() -> None:
    trained = train_tokenizer(["東西南北▅ 東西南北\n" * 50, "x" * 10], vocab_size=300)
    assert trained.encode("東西南北") == [trained.processor.piece_to_id("東西南北")]
    assert trained.decode(trained.encode("▅")) == "▅"
    assert any("▅" in note for note in trained.notes)


def test_japanese_without_a_single_space_keeps_spaces() -> None:
    trained = train_tokenizer([NEKO.replace("\u3000", "") * 3], vocab_size=500)
    assert trained.decode(trained.encode(" a  b ")) == " a  b "
    assert trained.processor.piece_to_id("▁") != trained.unk_id


def test_options_that_lose_text_say_so() -> None:
    trained = train_tokenizer(
        CORPUS, vocab_size=900, normalization_rule_name="nmt_nfkc", user_symbols=["<mark>"]
    )
    assert trained.encode("ＡＢＣ") == trained.encode("ABC")
    assert any("do not come back exactly" in note for note in trained.notes)
    assert trained.byte_lengths() is None
    assert trained.encode("<mark>") == [trained.processor.piece_to_id("<mark>")]


def test_small_corpus_gives_a_smaller_vocabulary_with_a_note() -> None:
    trained = train_tokenizer(["ab ab ab"], vocab_size=5000)
    assert trained.vocab_size < 300
    assert any("not 5,000" in note for note in trained.notes)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "there is no text to train a tokenizer on"),
        (["\n\n", ""], {}, "there is no text"),
        (
            [NEKO],
            {"vocab_size": 300},
            r"vocab_size 300 is too small: .* need 3\d\d: set tokenizer.vocab_size",
        ),
        ([NEKO], {"no_such_option": 1}, "SentencePiece cannot train this: .*no_such_option"),
        ([NEKO], {"model_type": "word"}, "unknown model_type 'word'; choose from bpe, char, unigram"),
    ],
)
def test_wrong_requests_for_training(texts: list[str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        train_tokenizer(texts, **options)
    assert "\n" not in str(caught.value)


def test_error_while_reading_texts_is_raised_unchanged() -> None:
    def texts() -> Iterator[str]:
        yield NEKO
        raise KeyError("the reader's own error")

    with pytest.raises(KeyError, match="the reader's own error"):
        train_tokenizer(texts(), vocab_size=500)


def test_characters_as_tokens(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    trained = train_tokenizer(CORPUS, vocab_size=700, model_type="char", folder=tmp_path)
    assert len(trained.encode("吾輩は猫である。")) == 8
    hub = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEST_TEXTS, NEKO, CODE[:2000]]:
        assert trained.decode(trained.encode(text)) == text
        assert hub.encode(text) == trained.encode(text)


def test_samples_of_a_corpus_are_bounded_and_repeatable(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number:02}.txt").write_text(f"{number} " + "x" * 100_000)
    sources: list[Source] = resolve_sources([str(tmp_path)])
    bad: list[Any] = []
    everything = list(sample_texts(sources, bad=bad.append))
    assert [text.split()[0] for text in everything] == [str(n) for n in range(40)]
    some = list(sample_texts(sources, max_bytes=1_000_000, seed=1, bad=bad.append))
    assert 10 <= len(some) <= 11
    assert some == list(sample_texts(sources, max_bytes=1_000_000, seed=1, bad=bad.append))
    assert some != list(sample_texts(sources, max_bytes=1_000_000, seed=2, bad=bad.append))
    assert bad == []


def test_sample_of_one_enormous_document_is_bounded_in_bytes(tmp_path: Path) -> None:
    """Its limit was counted in characters, of which Japanese has three bytes each."""
    (tmp_path / "a.txt").write_text("日本語" * 300_000, encoding="utf-8")
    bad: list[Any] = []
    [text] = sample_texts(resolve_sources([str(tmp_path)]), max_bytes=1_000_000, bad=bad.append)
    assert text == "日本語" * 111_111


def test_sample_has_text_of_every_compressed_file(tmp_path: Path) -> None:
    """Their size on the disk does not tell how much text is in them: the first one was nearly all of the sample."""
    for name, count in (("en", 2200), ("ja", 500)):
        lines = [f"{name} {number} " + "x" * 1000 for number in range(count)]
        lines[100] = "\0"
        (tmp_path / f"{name}.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode(), 1))
    sources = resolve_sources([str(tmp_path / "en.txt.gz"), str(tmp_path / "ja.txt.gz")], unit="line")
    bad: list[Any] = []
    some = list(sample_texts(sources, max_bytes=2_400_000, bad=bad.append))
    counts = {name: sum(text.startswith(name) for text in some) for name in ("en", "ja")}
    assert counts["ja"] == 499
    assert sum(map(len, some)) == pytest.approx(2_400_000, rel=0.001)  # the rest is from the larger file
    assert len(set(some)) == len(some)
    assert len(bad) == 2


# --- loading what others made ---


def foreign_model(**options: Any) -> bytes:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in CORPUS for line in text.split("\n")]),
        model_writer=out,
        minloglevel=2,
        **{"vocab_size": 600, "hard_vocab_limit": False, **options},
    )
    return out.getvalue()


def test_hub_dataset_is_training_text(tmp_path: Path) -> None:
    """From a local folder: the same code path as the Hub, without the network."""
    for shard in range(2):
        rows = [json.dumps({"text": f"line {number} of {shard}"}) for number in range(40)]
        (tmp_path / f"train-{shard}.jsonl").write_text("\n".join(rows))
    bad: list[Any] = []
    found = list(sample_texts(resolve_sources([f"hf://{tmp_path}"]), bad=bad.append))
    assert found == [f"line {number} of {shard}" for shard in range(2) for number in range(40)]
    few = list(sample_texts(resolve_sources([f"hf://{tmp_path}"]), max_bytes=30, bad=bad.append))
    assert few == found[40:43], "the shards are taken in a seeded order"
    assert bad == []


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "bpe"},
        {"model_type": "bpe", "byte_fallback": True, "vocab_size": 800},
        {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        {"model_type": "unigram", "byte_fallback": True, "vocab_size": 800, "pad_id": 3},
        {
            "model_type": "bpe",
            "add_dummy_prefix": False,
            "user_defined_symbols": ["<sep>"],
            "control_symbols": ["[CLS]"],
        },
    ],
)
def test_foreign_model_keeps_its_outputs(tmp_path: Path, options: dict[str, Any]) -> None:
    from transformers import AutoTokenizer

    data = foreign_model(**options)
    path = tmp_path / "spiece.model"
    path.write_bytes(data)
    loaded = load_tokenizer(path)
    native = sentencepiece.SentencePieceProcessor(model_proto=data)
    # transformers normalizes half-width kana with a voicing mark otherwise, and writes unknown text as <unk>.
    lines = [line for text in CORPUS for line in text.split("\n") if "ﾞ" not in line and "ﾟ" not in line]
    texts = [line for line in lines if line and native.unk_id() not in native.encode(line)][:150]
    assert [ids.tolist() for ids in loaded.encode_batch(texts)] == native.encode(texts)
    assert loaded.encode(NEKO * 30) == native.encode(NEKO * 30)
    assert loaded.byte_lengths() is None  # it normalizes, or puts a space in front
    loaded.save(tmp_path / "folder")
    assert "in transformers some texts are not the same" in str(loaded.notes)
    hub = AutoTokenizer.from_pretrained(tmp_path / "folder")
    if options["model_type"] == "bpe":
        assert [hub.encode(text) for text in texts] == native.encode(texts)
    assert [hub.decode(ids) for ids in native.encode(texts)] == native.decode(native.encode(texts))
    again = load_tokenizer(tmp_path / "folder")
    assert (again.fingerprint, again.special_ids) == (loaded.fingerprint, loaded.special_ids)
    if "control_symbols" in options:
        assert loaded.special_ids["cls_token_id"] == native.piece_to_id("[CLS]")
        assert loaded.special_ids["sep_token_id"] == native.piece_to_id("<sep>")


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer folder like that of GPT-2, made by transformers."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(CORPUS, trainer)
    path = tmp_path_factory.mktemp("byte_level")
    PreTrainedTokenizerFast(
        tokenizer_object=fast, eos_token="<|endoftext|>", model_max_length=77
    ).save_pretrained(path)
    return path


def test_load_transformers_folder(byte_level: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    loaded = load_tokenizer(byte_level)
    hub = AutoTokenizer.from_pretrained(byte_level)
    assert (loaded.eos_id, loaded.pad_id, loaded.special_ids) == (0, None, {"eos_token_id": 0})
    assert loaded.vocab_size == len(hub)
    lengths = loaded.byte_lengths()
    assert lengths is not None
    for text in [*TEST_TEXTS, NEKO, CODE.replace("<|endoftext|>", "")]:
        ids = loaded.encode(text)
        assert ids == hub.encode(text, add_special_tokens=False)
        assert loaded.decode(ids) == text
        assert lengths[ids].sum() == len(text.encode())
    assert 0 not in loaded.encode("a<|endoftext|>b")
    assert loaded.decode(loaded.encode("a<|endoftext|>b")) == "a<|endoftext|>b"
    (byte_level / "config.json").write_text('{"model_type": "gpt2"}')
    loaded.save(tmp_path, model_max_length=512)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == loaded.fingerprint
    assert pickle.loads(pickle.dumps(loaded)).encode(NEKO) == loaded.encode(NEKO)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert (saved.model_max_length, saved.encode(NEKO)) == (512, loaded.encode(NEKO))
    assert not (tmp_path / "config.json").exists()


def test_loading_a_tokenizer_describes_it_no_more_often_than_needed(
    byte_level: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time takes a second with 128,000 pieces, and every rank loads it at every start."""
    made: list[str] = []
    fingerprint_of = huggingface.fingerprint_of

    def counted(*args: Any, **options: Any) -> str:
        made.append(fingerprint_of(*args, **options))
        return made[-1]

    monkeypatch.setattr(huggingface, "fingerprint_of", counted)
    loaded = load_tokenizer(byte_level)
    assert made == [loaded.fingerprint] * 3, "the folder's, its copy's and that of what was opened"


def test_text_beyond_the_context_gives_no_warning_of_transformers(
    byte_level: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer of a run says its context, so that each resume of a small model printed "indexing errors"."""
    load_tokenizer(byte_level).save(tmp_path, model_max_length=8)
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        loaded = load_tokenizer(tmp_path)
        monkeypatch.setattr(loaded, "_backend", None)  # as for a tokenizer of Python code
        assert len(loaded.encode(NEKO)) > 8
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "longer than the specified maximum" not in caplog.text


def test_hub_is_queried_with_the_revision(byte_level: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def snapshot(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        assert not any(pattern.endswith((".py", "*")) for pattern in allow_patterns)
        return str(byte_level)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert load_tokenizer("owner/name", revision="abc").encode("猫") == load_tokenizer(byte_level).encode(
        "猫"
    )
    commit = byte_level.name  # the Hub's cache names the folder after it
    assert load_tokenizer("owner/name@v1").notes == (f"owner/name: commit {commit}",)
    assert load_tokenizer("gpt2").notes == (f"gpt2: commit {commit} (give tokenizer.revision to pin it)",)
    assert asked == [("owner/name", "abc"), ("owner/name", "v1"), ("gpt2", None)]


def test_remote_code_is_never_run(byte_level: Path, tmp_path: Path) -> None:
    for file in byte_level.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    ignored = config | {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(ignored))
    assert load_tokenizer(tmp_path).notes == ("it brings code of its own (auto_map), which is not run",)
    config = ignored | {"tokenizer_class": "Evil"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    mark = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    (tmp_path / "config.json").unlink(missing_ok=True)
    with pytest.raises(RequestError):
        load_tokenizer(tmp_path)
    assert not mark.exists()


def test_wrong_requests_for_loading(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.model").write_bytes(b"no model at all")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "changed").mkdir()
    for name in (tokenizer.MODEL_FILE, tokenizer.RECORD_FILE):
        (tmp_path / "changed" / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "changed" / tokenizer.MODEL_FILE).write_bytes(foreign_model(model_type="bpe"))
    (tmp_path / "no_eos.model").write_bytes(foreign_model(model_type="bpe", eos_id=-1))
    (tmp_path / "words.model").write_bytes(foreign_model(model_type="word", hard_vocab_limit=False))
    for path, message in {
        "broken.model": "not a SentencePiece model",
        "tokenizer.json": "give a .model file, or the folder of a tokenizer of transformers",
        "missing.model": "no such tokenizer",
        "a/b/c": "no such tokenizer",
        "empty": "holds no tokenizer",
        "changed": "is not the model that",
        "no_eos.model": "no end-of-text token",
        "words.model": "word models have no equivalent in transformers",
    }.items():
        with pytest.raises(RequestError, match=message) as caught:
            load_tokenizer(tmp_path / path)
        assert "\n" not in str(caught.value)
    with pytest.raises(RequestError, match="none from the Hub"):
        load_tokenizer("owner/certainly-not-here")


def test_load_bare_model_folder(folder: Path, tmp_path: Path, ours: SentencePieceTokenizer) -> None:
    (tmp_path / "my.model").write_bytes((folder / tokenizer.MODEL_FILE).read_bytes())
    assert load_tokenizer(tmp_path).fingerprint == ours.fingerprint
    assert load_tokenizer(tmp_path / "my.model").fingerprint == ours.fingerprint


def test_trainer_gets_every_line() -> None:
    lines = training.TrainingLines(["a\n\nb", "c" * 40_000, "", "猫" * 10_000])
    given_lines = list(lines)
    assert "".join(given_lines) == "ab" + "c" * 40_000 + "猫" * 10_000
    assert max(len(line.encode()) for line in given_lines) <= 16_384
    assert lines.counts() == {"documents": 4, "lines": 4, "bytes": 70_002, "cut_lines": 2}


# --- symbols of the user, what a tokenizer was made of, and whether it is the right one ---


@pytest.mark.parametrize("model_type", ["bpe", "char"])
@pytest.mark.parametrize(
    "symbols",
    [
        ["<|end of turn|>", "<|x|>", "日本 語"],
        ["<|im_start|>", "<|im_start|>user", "  ", "def"],
        [" x ", "\t", "\n\n", "a\nb", 'a,"b'],
        ["[CLS]", "[SEP]", "<|endoftext|>", "é"],
    ],
)
def test_user_symbols_are_one_token_in_training_and_in_transformers(
    symbols: list[str], model_type: str, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    made = train_tokenizer(
        CORPUS, vocab_size=900, user_symbols=symbols, model_type=model_type, folder=tmp_path
    )
    hub = AutoTokenizer.from_pretrained(tmp_path)
    for symbol in symbols:
        assert len(made.encode(symbol)) == 1
        for text in (symbol, f"猫{symbol}b", f" {symbol} {symbol}{symbol}", symbol[:-1], *symbols):
            assert hub(text)["input_ids"] == made.encode(text)
            assert made.decode(made.encode(text)) == hub.decode(hub(text)["input_ids"]) == text


@pytest.mark.parametrize(
    ("symbols", "message"),
    [
        ([""], "'' cannot be a symbol"),
        ([" "], "' ' is a piece of every SentencePiece model already"),
        (["▁"], "already"),
        (["</s>"], "'</s>' is a piece"),
        (["<unk>"], "'<unk>' is a piece"),
        (["<0x41>"], "'<0x41>' is a piece"),
        (["<x>", "<x>"], "'<x>' is given twice"),
        (["a b", "a▁b"], "given twice"),
        (["a\udce9"], r"'a.udce9' cannot be a symbol.*UTF-8"),
    ],
)
def test_impossible_user_symbols_are_refused(symbols: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        train_tokenizer(CORPUS, vocab_size=900, user_symbols=symbols)


@pytest.mark.parametrize("size", [1, 3, 4, 259])
def test_too_small_a_vocabulary_is_refused_with_the_least_size(size: int) -> None:
    with pytest.raises(
        RequestError, match=rf"vocab_size {size} is too small.*need \d+.*tokenizer.vocab_size"
    ):
        train_tokenizer(CORPUS, vocab_size=size)


def test_tokenizer_fills_in_a_gpt2_config_as_transformers_does(
    ours: SentencePieceTokenizer, hub: Any
) -> None:
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "vocab_size"):
        assert getattr(ours, name) == getattr(hub, name)
    assert len(ours) == len(hub)
    assert ours("猫")["input_ids"] == hub("猫")["input_ids"]
    assert ours("猫")["attention_mask"] == hub("猫")["attention_mask"]
    assert ours(["猫", "a b"])["input_ids"] == hub(["猫", "a b"])["input_ids"]


def source_of(folder: Path, **options: Any) -> dict[str, Any]:
    given = {"vocab_size": 900, **options}
    return tokenizer_source(
        [str(folder)],
        reading=Reading(),
        valid_fraction=0.0,
        splits={},
        max_bytes=10**6,
        seed=1,
        options=given,
    )


def test_tokenizer_record_names_its_sources(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(NEKO)
    before = source_of(tmp_path / "text")
    made = train_tokenizer([NEKO], vocab_size=500, folder=tmp_path / "made", made_from=before)
    opened = load_tokenizer(tmp_path / "made")
    assert isinstance(opened, SentencePieceTokenizer)
    assert opened.record["made_from"] == before == source_of(tmp_path / "text")
    assert opened.fingerprint == made.fingerprint
    (tmp_path / "text").rename(tmp_path / "moved")
    assert source_changes(before, source_of(tmp_path / "moved")) == ""
    assert source_changes(before, source_of(tmp_path / "moved", vocab_size=600)) == (
        "tokenizer.vocab_size 900 -> 600"
    )
    (tmp_path / "moved" / "a.txt").write_text(NEKO.replace("猫", "犬"))
    assert source_changes(before, source_of(tmp_path / "moved")) == "other text"


def test_tokenizer_of_a_checkpoint_is_told_from_others(
    ours: SentencePieceTokenizer, byte_level: Path
) -> None:
    other = load_tokenizer(byte_level)
    check_tokenizer(ours.fingerprint, ours)
    check_tokenizer(None, ours)  # checkpoints of version 0.1.0 do not say
    for fingerprint in (other.fingerprint, *other.former_fingerprints):
        check_tokenizer(fingerprint, other)
        with pytest.raises(
            RequestError, match=r"runs/x is not the tokenizer that the checkpoint was trained with"
        ):
            check_tokenizer(fingerprint, ours, folder="runs/x")


def test_saving_removes_the_files_of_another_tokenizer_only(
    folder: Path, byte_level: Path, tmp_path: Path
) -> None:
    load_tokenizer(folder).save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    other = load_tokenizer(byte_level)
    other.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == other.fingerprint
    assert (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "config.json").exists()
    assert not (tmp_path / tokenizer.MODEL_FILE).exists()
    load_tokenizer(folder).save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == load_tokenizer(folder).fingerprint


@pytest.mark.parametrize(
    ("texts", "options", "words"),
    [
        (CORPUS, {"vocab_size": 0}, "vocab_size must be a whole number from 1 to 16,777,216, not 0"),
        (CORPUS, {"vocab_size": -5}, "from 1 to 16,777,216, not -5"),
        (CORPUS, {"vocab_size": 2**31}, "from 1 to 16,777,216, not 2147483648"),
        (CORPUS, {"vocab_size": 300.5}, "from 1 to 16,777,216, not 300.5"),
        (CORPUS, {"character_coverage": 0.9}, "character_coverage must be from 0.98 to 1, not 0.9"),
        (CORPUS, {"character_coverage": float("nan")}, "from 0.98 to 1, not nan"),
        (
            CORPUS,
            {"vocab_size": 10, "model_type": "char"},
            "vocab_size 10 is too small: 256 bytes, 4 special",
        ),
        (["<u>"], {"model_type": "char", "user_symbols": ["<u>"]}, "nothing but the symbols"),
        (["<u>"], {"model_type": "unigram", "user_symbols": ["<u>"]}, "nothing but the symbols"),
    ],
)
def test_refusals_of_training_say_what_is_allowed(
    texts: list[str], options: dict[str, Any], words: str
) -> None:
    """Not the line of SentencePiece's source at which it gave up."""
    with pytest.raises(RequestError, match=words) as error:
        train_tokenizer(texts, **{"vocab_size": 300, **options})
    assert ".cc(" not in str(error.value)
