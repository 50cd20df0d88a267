"""Tokenizers of other families: a tokenizer is what transformers opens from its folder, whichever files that takes."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from lmcore.data.tokenizer.huggingface import TEST_TEXTS, former_fingerprints, read_files
from lmcore.data.tokenizer.tokenizer import load_tokenizer
from lmcore.errors import RequestError

CORPUS = Path(__file__).read_text(encoding="utf-8") * 2
SPECIAL = "import os <s> a</s> b<pad> <|endoftext|> [SEP][CLS] <unk> x <mask>"


@cache
def unigram() -> bytes:
    return sentencepiece_model(model_type="unigram")


@cache
def bpe() -> bytes:
    return sentencepiece_model(model_type="bpe", byte_fallback=True)


def sentencepiece_model(**options: Any) -> bytes:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.split("\n")),
        model_writer=out,
        vocab_size=400,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return out.getvalue()


@cache
def byte_level() -> Fast:
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", "<s>", "</s>", "<pad>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator([CORPUS], trainer)
    return fast


def files_of_gpt2() -> dict[str, bytes]:
    model = json.loads(byte_level().to_str())["model"]
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    return {"vocab.json": json.dumps(model["vocab"]).encode(), "merges.txt": merges.encode()}


def words() -> dict[str, bytes]:
    characters = [chr(code) for code in range(33, 127)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *("##" + one for one in characters)]
    return {"vocab.txt": "\n".join(pieces).encode()}


def piece_ids() -> bytes:
    processor = sentencepiece.SentencePieceProcessor(model_proto=unigram())
    pieces = [processor.id_to_piece(number) for number in range(processor.get_piece_size())]
    return json.dumps({piece: number for number, piece in enumerate([*pieces, "<pad>"])}).encode()


def at(name: str, model: Callable[[], bytes] = unigram) -> Callable[[], dict[str, bytes]]:
    return lambda: {name: model()}


def marian() -> dict[str, bytes]:
    return {"vocab.json": piece_ids(), "source.spm": unigram(), "target.spm": unigram()}


def m2m100() -> dict[str, bytes]:
    return {"vocab.json": piece_ids(), "sentencepiece.bpe.model": unigram()}


FAMILIES: dict[str, tuple[Callable[[], dict[str, bytes]], str | None]] = {
    "XLMRobertaTokenizer": (at("sentencepiece.bpe.model"), "xlm-roberta"),
    "CamembertTokenizer": (at("sentencepiece.bpe.model"), "camembert"),
    "NllbTokenizer": (at("sentencepiece.bpe.model"), "m2m_100"),
    "MBartTokenizer": (at("sentencepiece.bpe.model"), "mbart"),
    "MBart50Tokenizer": (at("sentencepiece.bpe.model"), None),
    "BarthezTokenizer": (at("sentencepiece.bpe.model"), None),
    "PLBartTokenizer": (at("sentencepiece.bpe.model"), "plbart"),
    "BigBirdTokenizer": (at("spiece.model"), "big_bird"),
    "T5Tokenizer": (at("spiece.model"), "t5"),
    "XLNetTokenizer": (at("spiece.model"), "xlnet"),
    "ReformerTokenizer": (at("spiece.model", bpe), "reformer"),
    "BertGenerationTokenizer": (at("spiece.model"), None),
    "SiglipTokenizer": (at("spiece.model"), None),
    "GPTSw3Tokenizer": (at("spiece.model"), "gpt2"),
    "RemBertTokenizer": (at("sentencepiece.model"), "rembert"),
    "DebertaV2Tokenizer": (at("spm.model"), "deberta-v2"),
    "SpeechT5Tokenizer": (at("spm_char.model"), None),
    "LlamaTokenizer": (at("tokenizer.model", bpe), "llama"),
    "GemmaTokenizer": (at("tokenizer.model", bpe), "gemma"),
    "M2M100Tokenizer": (m2m100, "m2m_100"),
    "MarianTokenizer": (marian, "marian"),
    "ByT5Tokenizer": (dict, "t5"),
    "PerceiverTokenizer": (dict, None),
    "BertTokenizer": (words, "bert"),
    "DistilBertTokenizer": (words, None),
    "MPNetTokenizer": (words, None),
    "BertTokenizerLegacy": (words, None),
    "GPT2Tokenizer": (files_of_gpt2, "gpt2"),
    "RobertaTokenizer": (files_of_gpt2, None),
    "DebertaTokenizer": (files_of_gpt2, None),
    "Qwen2Tokenizer": (files_of_gpt2, "qwen2"),
    "CodeGenTokenizer": (files_of_gpt2, None),
    "GPTNeoXTokenizer": (files_of_gpt2, "gpt_neox"),
    "CLIPTokenizer": (files_of_gpt2, None),
    "WhisperTokenizer": (files_of_gpt2, None),
    "HerbertTokenizer": (files_of_gpt2, None),
}


def write(
    folder: Path, files: dict[str, bytes], config: dict[str, Any] | None, model_type: str | None
) -> Path:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if model_type is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def transformers_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
@pytest.mark.parametrize("family", FAMILIES)
def test_training_the_folder_and_the_export_have_the_same_ids(family: str, tmp_path: Path) -> None:
    files, model_type = FAMILIES[family]
    folder = write(tmp_path / "theirs", files(), {"tokenizer_class": family}, model_type)
    original, loaded = transformers_of(folder), load_tokenizer(folder)
    assert loaded.vocab_size >= len(original) > 100
    plain = [*TEST_TEXTS, CORPUS[:3000]]
    for text in plain:
        if "<s>" not in text:
            assert loaded.encode(text) == original(text, add_special_tokens=False)["input_ids"]

    loaded.save(tmp_path / "export", model_max_length=64)
    # Of the model that is exported
    (tmp_path / "export" / "config.json").write_text('{"model_type": "gpt2"}')
    exported = transformers_of(tmp_path / "export")
    for text in [*plain, SPECIAL]:
        assert exported(text, add_special_tokens=False)["input_ids"] == loaded.encode(text)
    assert exported.model_max_length == 64
    again = load_tokenizer(tmp_path / "export")
    assert (again.fingerprint, again.special_ids) == (loaded.fingerprint, loaded.special_ids)


def gpt2_like(folder: Path, tokenizer: Fast | None = None, **config: Any) -> Path:
    description = (tokenizer or byte_level()).to_str().encode()
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", **config}
    return write(folder, {"tokenizer.json": description}, fields, None)


def test_equal_tokenizers_have_equal_fingerprints(tmp_path: Path) -> None:
    first = load_tokenizer(gpt2_like(tmp_path / "a"))
    other = gpt2_like(tmp_path / "b", model_max_length=99)
    (other / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    (other / "README.md").write_text("a page")
    description = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(description, indent=3))
    assert load_tokenizer(other).fingerprint == first.fingerprint
    cut = Fast.from_str(byte_level().to_str())
    cut.enable_truncation(16)
    cut.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    bounded = load_tokenizer(gpt2_like(tmp_path / "c", cut))
    assert bounded.fingerprint == first.fingerprint
    assert bounded.encode(CORPUS[:500]) == first.encode(CORPUS[:500])
    assert len(first.encode(CORPUS[:500])) > 16
    # What decides the tokens of a store does change it.
    assert load_tokenizer(gpt2_like(tmp_path / "d", eos_token="</s>")).fingerprint != first.fingerprint
    del description["model"]["merges"][-1]
    fewer = gpt2_like(tmp_path / "e")
    (fewer / "tokenizer.json").write_text(json.dumps(description))
    assert load_tokenizer(fewer).fingerprint != first.fingerprint


def test_options_of_a_python_tokenizer_are_part_of_its_fingerprint(tmp_path: Path) -> None:
    """They decide the ids, and no file of the vocabulary holds them: the token store of the other one was opened."""
    words = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcABC日本"]) + "\n"
    made = {}
    for name, options in {
        "plain": {},
        "same": {"do_lower_case": False},
        "lower": {"do_lower_case": True},
    }.items():
        config = {
            "tokenizer_class": "BertJapaneseTokenizer",
            "subword_tokenizer_type": "character",
            **options,
        }
        config["word_tokenizer_type"] = "basic"
        made[name] = load_tokenizer(write(tmp_path / name, {"vocab.txt": words.encode()}, config, None))
    assert made["plain"].encode("A 日本") != made["lower"].encode("A 日本")
    assert made["plain"].fingerprint == made["same"].fingerprint != made["lower"].fingerprint
    # Stores and checkpoints that carry what it was called before still open.
    assert set(made["plain"].former_fingerprints) & set(made["lower"].former_fingerprints)
    made["lower"].save(tmp_path / "saved")
    again = pickle.loads(pickle.dumps(load_tokenizer(tmp_path / "saved")))
    assert again.fingerprint == made["lower"].fingerprint


def test_former_fingerprints_are_those_of_version_0_1_0(tmp_path: Path) -> None:
    """As that version computed them: over the raw files, the model's config.json among them or not."""
    import hashlib

    folder = gpt2_like(tmp_path / "a", model_max_length=5)
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    for names in (("config.json", "tokenizer.json"), ("tokenizer.json",)):
        digest = hashlib.sha256(b"transformers")
        parts = {name: (folder / name).read_bytes() for name in names}
        parts["tokenizer_config.json"] = b'{"eos_token": "<|endoftext|>"}'
        for name in sorted(parts):
            digest.update(f"\0{name}\0{len(parts[name])}\0".encode() + parts[name])
        assert digest.hexdigest() in load_tokenizer(folder).former_fingerprints
    saved = load_tokenizer(folder)
    saved.save(tmp_path / "saved", model_max_length=9)
    # The copy that a run keeps has no config.json: only that fingerprint can be told from it.
    assert set(former_fingerprints(read_files(tmp_path / "saved"))) & set(saved.former_fingerprints)


def test_chat_template_keeps_its_special_tokens(tmp_path: Path) -> None:
    folder = gpt2_like(tmp_path / "a", chat_template="{{ messages[0].content }}<|endoftext|>")
    load_tokenizer(folder).save(tmp_path / "export")
    exported = transformers_of(tmp_path / "export")
    ids = exported.apply_chat_template([{"role": "user", "content": "hi"}], return_dict=True)["input_ids"]
    assert ids[-1] == 0
    assert 0 not in load_tokenizer(tmp_path / "export").encode("a<|endoftext|>")


def test_vocabulary_that_transformers_does_not_read_is_refused(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "a",
        {"sentencepiece.bpe.model": unigram()},
        {"tokenizer_class": "XGLMTokenizer"},
        "xglm",
    )
    with pytest.raises(RequestError, match=r"with \d+ pieces, but sentencepiece.bpe.model has \d+"):
        load_tokenizer(folder)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "xlm-roberta", "t5", "bert"])
def test_folder_without_a_vocabulary_is_refused(tmp_path: Path, model_type: str) -> None:
    """transformers opens an empty tokenizer from it."""
    folder = write(tmp_path / "a", {}, None, model_type)
    with pytest.raises(
        RequestError, match=r"needs a vocabulary, and there is none of .*tokenizer\.json|cannot open"
    ):
        load_tokenizer(folder)


def test_files_of_an_unexpected_name_are_kept_where_they_matter(tmp_path: Path) -> None:
    """``fast_tokenizer_files`` names another file than tokenizer.json."""
    folder = gpt2_like(tmp_path / "a", fast_tokenizer_files=["tokenizer.json", "tokenizer.4.0.0.json"])
    (folder / "tokenizer.json").rename(folder / "tokenizer.4.0.0.json")
    (folder / "tokenizer.json").write_text('{"damaged": true}')
    loaded = load_tokenizer(folder)
    assert loaded.encode(CORPUS[:99]) == transformers_of(folder)(CORPUS[:99])["input_ids"]
    loaded.save(tmp_path / "export")
    assert load_tokenizer(tmp_path / "export").fingerprint == loaded.fingerprint


def test_damaged_folders_are_refused_in_one_line(tmp_path: Path) -> None:
    good = byte_level().to_str()
    newer = json.loads(good)
    newer["model"]["type"] = "BPE2"
    future = json.loads(good)
    future["pre_tokenizer"] = {"type": "FutureSplit"}
    missing = json.loads(good)
    del missing["model"]["vocab"]["e"]
    config = '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}'
    cases = {
        "newer": (json.dumps(newer), config),
        "future": (json.dumps(future), config),
        "missing": (json.dumps(missing), config),
        "truncated": (good[: len(good) // 2], config),
        "empty": ("", config),
        "deep": ("[" * 100_000, config),
        "bad_config": (good, "{"),
        "list_config": (good, "[]"),
        "deep_config": (good, '{"a": ' * 50_000),
        "no_eos": (good, "{}"),
        "recursive": (good, '{"tokenizer_class": "AutoTokenizer"}'),
        "numbers": (good, '{"tokenizer_class": 5, "eos_token": 7}'),
    }
    for name, (description, fields) in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "tokenizer.json").write_text(description)
        (folder / "tokenizer_config.json").write_text(fields)
        with pytest.raises(RequestError) as caught:
            load_tokenizer(folder)
        assert "\n" not in str(caught.value)
