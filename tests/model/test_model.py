"""Models of any family with their loss in one module: initialization, vocabulary, packing, the user's own."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmcore.conventions import IGNORED_LABEL
from lmcore.errors import RequestError
from lmcore.model import module as m
from lmcore.model.build import build_model
from lmcore.model.config import configured_context_length, context_length

GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
GQA = {**LLAMA, "num_key_value_heads": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "llama": GQA,
    "qwen2": GQA,
    "qwen3": {**GQA, "head_dim": 16},
    "mistral": GQA,
    "mixtral": {**GQA, "num_local_experts": 2},
    "gemma2": {**GQA, "head_dim": 16, "attn_implementation": None},
    "gpt_neox": LLAMA,
    "phi": LLAMA,
    "olmo2": GQA,
    "cohere": GQA,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 32,
    },
    "bert": LLAMA,
    "nanochat": LLAMA,
    "granite": {**GQA, "logits_scaling": 8.0},
    "gemma3_text": {**GQA, "head_dim": 16},
}
FAMILIES["gemma2"].pop("attn_implementation")
FULL_LOGITS = {"opt", "bert"}
HEAD_FORMS = {
    "nanochat": m.HeadForm(softcap=15.0),
    "gemma2": m.HeadForm(softcap=30.0),
    "cohere": m.HeadForm(scale=0.0625),
    "granite": m.HeadForm(scale=1 / 8),
}
V = 100
IDS = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "unk_token_id": 0,
    "sep_token_id": 4,
    "cls_token_id": 5,
}


def build(type: str = "gpt2", overrides: dict[str, Any] | None = None, **options: Any) -> Any:
    given: dict[str, Any] = {"vocab_size": V, "special_ids": IDS, "block_size": 32, "seed": 0} | options
    return build_model(
        type=type, config_overrides=FAMILIES[type] if overrides is None else overrides, **given
    )


def batch(rows: int = 2, tokens: int = 16, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(6, V, (rows, tokens + 1), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:].clone()}


def reference(model: Any, b: dict[str, Tensor]) -> Tensor:
    logits = model(**{k: v for k, v in b.items() if k != "labels"}).logits[..., :V]
    return F.cross_entropy(logits.reshape(-1, V).float(), b["labels"].reshape(-1), reduction="sum")


# ------------------------------------------------------------------------------------- every family


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_that_of_the_familys_own_logits(family: str) -> None:
    model = build(family)
    notes: list[str] = []
    module = m.ModelWithLoss(model, chunk=5, note=notes.append).eval()
    b = batch()
    b["labels"][0, :3] = IGNORED_LABEL
    loss_sum, count = module(**b)
    assert int(count) == 29
    assert loss_sum.dtype == torch.float32
    # The chunks are summed in another order: float32 rounding of 29 losses of about 4.6.
    torch.testing.assert_close(loss_sum, reference(model, b), rtol=1e-5, atol=1e-4)
    assert (module.head_path == "chunked") == (family not in FULL_LOGITS)
    assert module.head_form == HEAD_FORMS.get(family, m.HeadForm())
    if family in FULL_LOGITS:  # the fallback is said, once, with its price
        assert len(notes) == 1
        assert "takes 512 KiB for 1,024 tokens" in notes[0]  # 128 columns x 4 bytes x 1,024
    else:
        assert not notes


@pytest.mark.parametrize("family", FAMILIES)
def test_causality_of_every_family(family: str) -> None:
    model = build(family).eval()
    ids = batch(rows=1)["input_ids"]
    changed = ids.clone()
    changed[0, 10] = (changed[0, 10] + 1) % V
    with torch.no_grad():
        one, two = model(input_ids=ids).logits, model(input_ids=changed).logits
    torch.testing.assert_close(one[:, :10], two[:, :10])
    assert not torch.allclose(one[:, 10:], two[:, 10:])


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "mistral", "gpt_neox"])
def test_packing_by_position_ids_equals_separate_documents(family: str) -> None:
    # Silently ignored by transformers unless the cache is off and no attention mask is given.
    module = m.ModelWithLoss(build(family)).eval()
    b = batch(rows=2, tokens=18)
    cuts = [(0, 7), (7, 12), (12, 18)]
    positions = torch.cat([torch.arange(stop - start) for start, stop in cuts]).expand(2, -1)
    packed, count = module(**b, position_ids=positions)
    parts = [module(**{k: v[:, start:stop] for k, v in b.items()}) for start, stop in cuts]
    assert int(count) == sum(int(c) for _, c in parts)
    torch.testing.assert_close(packed, sum(s for s, _ in parts), rtol=1e-5, atol=1e-4)
    mixed, _ = module(**b)
    assert abs(float((mixed - packed).detach())) > 1e-3


# --------------------------------------------------------------------------------------------- initialization


def same_structure(empty: Any, real: Any) -> None:
    """Names in their order, shapes, types, what is tied; every buffer, bit for bit; how the loss is made."""
    for (name, p), (other, q) in zip(empty.named_parameters(), real.named_parameters(), strict=True):
        assert p.is_meta, name
        assert (name, p.shape, p.dtype, p.requires_grad) == (other, q.shape, q.dtype, q.requires_grad)
    for (name, p), (other, q) in zip(empty.named_buffers(), real.named_buffers(), strict=True):
        assert name == other
        assert torch.equal(p, q), name
    assert empty.get_input_embeddings().padding_idx == real.get_input_embeddings().padding_idx
    assert m.vocabulary_parameters(empty) == m.vocabulary_parameters(real)
    assert m.ModelWithLoss(empty).head_path == m.ModelWithLoss(real).head_path
    assert all(p.is_meta for p in empty.parameters())  # the probe has given back what it borrowed


@pytest.mark.parametrize("family", FAMILIES)
def test_model_built_without_weights_is_the_same_model(family: str) -> None:
    same_structure(build(family, weights=False), build(family))


def test_pretrained_model_without_weights_is_the_same_model(tmp_path: Path) -> None:
    build("gpt2").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    given = {"overrides": {}, "from_pretrained": str(tmp_path)}
    same_structure(build("gpt2", weights=False, **given), build("gpt2", **given))


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral"])
def test_initialization_is_keyed_by_seed_and_name(family: str) -> None:
    one = build(family)
    torch.manual_seed(123)
    torch.randn(7)
    state = torch.get_rng_state()
    two = build(family)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's generator is left alone
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q), name
    other = build(family, seed=1)
    moved = [n for (n, p), q in zip(one.named_parameters(), other.parameters()) if not torch.equal(p, q)]
    assert {n for n, p in one.named_parameters() if p.ndim >= 2} <= set(moved)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("gpt_neox", LLAMA),  # attention.dense
        ("falcon", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}),
        ("gptj", {**GPT2, "rotary_dim": 4}),  # mlp.fc_out
        ("mixtral", FAMILIES["mixtral"]),  # the weights of all experts are one parameter
        ("granitemoe", {**GQA, "num_local_experts": 2}),
    ],
)
def test_zeroed_outputs_make_every_layer_the_identity(family: str, fields: dict[str, Any]) -> None:
    model = build(family, fields, zero_init=True)
    states = model(input_ids=batch()["input_ids"], output_hidden_states=True).hidden_states
    assert len(states) == 3
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)
    assert model.base_model.training


def test_zeroed_outputs_that_leave_a_layer_at_work_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcore.model.build._OUTPUT_PROJECTIONS", frozenset({"down_proj"}))
    with pytest.raises(RequestError, match="with down_proj at zero a LlamaDecoderLayer"):
        build("llama", zero_init=True)


def test_initialization_of_a_layer_does_not_depend_on_other_layers() -> None:
    base = {"initializer_range": 0.02, **LLAMA}
    small, large = (dict(build("llama", {**base, "num_hidden_layers": n}).named_parameters()) for n in (1, 3))
    assert all(torch.equal(p, large[name]) for name, p in small.items())


def test_initialization_follows_the_familys_own_distributions() -> None:
    model = build("gpt2", {**GPT2, "n_embd": 128, "n_layer": 8}, vocab_size=1000)
    p = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert float(p["transformer.wte.weight"].std()) == pytest.approx(0.02, rel=0.02)
    assert float(p["transformer.h.3.attn.c_attn.weight"].std()) == pytest.approx(0.02, rel=0.02)
    for name in ("attn", "mlp"):  # 1 / sqrt(2 * layers): the GPT-2 paper's residual scaling
        assert float(p[f"transformer.h.3.{name}.c_proj.weight"].std()) == pytest.approx(0.02 / 4, rel=0.03)
    assert p["transformer.h.3.attn.c_proj.bias"].eq(0).all()
    assert p["transformer.ln_f.weight"].eq(1).all()
    layers = [p[f"transformer.h.{i}.attn.c_attn.weight"] for i in range(8)]
    assert len({float(w[0, 0]) for w in layers}) == 8


def test_no_parameter_is_left_uninitialized_or_in_another_precision() -> None:
    for family in FAMILIES:
        for name, p in build(family).named_parameters():
            assert p.isfinite().all(), (family, name)
            assert p.dtype == torch.float32, (family, name)


def test_eos_is_trained_where_pad_is_eos() -> None:
    model = build("llama", special_ids={"eos_token_id": 2, "pad_token_id": 2})
    assert not model.get_input_embeddings().weight[2].eq(0).all()
    b = batch()
    b["input_ids"][:, 4] = 2
    m.ModelWithLoss(model)(**b)[0].backward()
    assert not model.get_input_embeddings().weight.grad[2].eq(0).all()


# ------------------------------------------------------------------------------------------------- vocabulary


@pytest.mark.parametrize(
    "family", ["gpt2", "llama", "phi", "gemma2"]
)  # tied, untied, head with bias, softcapped
def test_vocabulary_padding_gets_no_gradient_and_is_cut_on_export(family: str) -> None:
    model = build(family)
    assert model.config.vocab_size == 128
    assert model.real_vocab_size == V
    module = m.ModelWithLoss(model, chunk=7, label_smoothing=0.1, z_loss=1e-3)
    module(**batch())[0].backward()
    names = m.vocabulary_parameters(model)
    for name, p in model.named_parameters():
        if name in names:
            assert p.grad[V:].eq(0).all(), name
    exported = type(model)(m.export_config(model))
    exported.load_state_dict(dict(m.export_state(model.state_dict().items(), exported)))
    assert exported.config.vocab_size == exported.get_output_embeddings().weight.shape[0] == V
    assert exported.config.use_cache
    ids = batch()["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(
            exported.eval()(input_ids=ids).logits,
            model.eval()(input_ids=ids).logits[..., :V],
            rtol=0,
            atol=1e-6,
        )


def test_vocabulary_that_is_a_multiple_is_not_padded() -> None:
    notes: list[str] = []
    assert build(vocab_size=128, note=notes.append).config.vocab_size == 128
    assert notes == []


def test_special_ids_are_the_tokenizers() -> None:
    model = build()
    for config in (model.config, model.generation_config):
        assert {name: getattr(config, name) for name in IDS} == IDS
    assert json.loads(model.config.to_json_string())["cls_token_id"] == 5
    bare = build(special_ids={"eos_token_id": 2})
    assert (bare.config.bos_token_id, bare.config.eos_token_id) == (None, 2)  # and not 50,256
    assert bare.generation_config.bos_token_id is None


def test_parameter_counts() -> None:
    model = build()
    counts = m.parameter_counts(m.ModelWithLoss(model))
    assert counts["total"] == counts["trained"] == sum(p.numel() for p in model.parameters())
    assert counts["embedding"] == 128 * 32 + 64 * 32  # tokens and positions; the tied head counts once
    assert counts["body"] == counts["total"] - counts["embedding"]


# --------------------------------------------------------------------------------------------- wrong requests


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "gtp2"}, r"'gtp2': not a causal language model.*did you mean 'gpt2'"),
        (
            {"overrides": {"n_layers": 4}},
            r"model\.config\.n_layers is not a field of GPT2Config; did you mean 'n_layer'",
        ),
        ({"overrides": {"vocab_size": 4}}, "it is the tokenizer's"),
        (
            {"overrides": {"n_layer": 10**7}},
            r"model\.config: n_layer 10,000,000 is too large \(at most 4,096\)",
        ),
        ({"overrides": {"n_embd": 2**40}}, r"n_embd 1,099,511,627,776 is too large"),
        ({"overrides": {"n_layer": "four"}}, "n_layer.*expected int"),
        ({"overrides": {"n_embd": 33, "n_head": 2}}, "GPT2LMHeadModel refuses"),
        ({"overrides": {"_attn_implementation_internal": "x/y"}}, "is not a field"),
        ({"block_size": 65}, "65 is more than the model's context of 64"),
        ({"attention": "someone/kernel"}, r"'someone/kernel' must be one of eager, sdpa"),
        ({"special_ids": {"eos_token_id": 100}}, "eos_token_id 100 is outside its vocabulary of 100"),
        ({"factory": "nothing"}, "package.module:function"),
        ({"factory": "no.such.module:f"}, "cannot import"),
        ({"factory": "collections:OrderedDic"}, "did you mean 'OrderedDict'"),
        ({"factory": "collections:OrderedDict", "overrides": {}}, "not a torch.nn.Module"),
        ({"from_pretrained": "/no/such/folder"}, "model.from_pretrained '/no/such/folder'"),
    ],
)
def test_wrong_requests_name_the_value_and_the_remedy(options: dict[str, Any], message: str) -> None:
    type = options.pop("type", "gpt2")
    with pytest.raises(RequestError, match=message) as caught:
        build_model(
            **{
                "type": type,
                "config_overrides": options.pop("overrides", GPT2),
                "vocab_size": V,
                "block_size": 32,
                "seed": 0,
                **options,
            }
        )
    assert "\n" not in str(caught.value)


def test_context_length() -> None:
    assert configured_context_length("gpt2", {}) == 1024
    assert configured_context_length("gpt2", {"n_positions": 77}) == 77
    assert configured_context_length("llama", {"max_position_embeddings": 99}) == 99
    assert configured_context_length("bloom", {}) is None


@pytest.mark.parametrize(
    ("type", "instead"), [("gemma3", "gemma3_text"), ("qwen3_5", "qwen3_5_text"), ("fuyu", "persimmon")]
)
def test_model_of_text_and_images_is_refused_with_its_language_model(type: str, instead: str) -> None:
    """Its vocabulary, special tokens and cache are fields of another config: what is set would do nothing."""
    with pytest.raises(RequestError, match=rf"model.type {type} .* give model.type {instead}"):
        build(type, {})


def test_special_id_that_a_strict_config_cannot_leave_out() -> None:
    fields = LLAMA | {"max_position_embeddings": 64}
    model = build("modernbert-decoder", fields, special_ids={name: IDS[name] for name in list(IDS)[:3]})
    assert model.config.pad_token_id == 3  # and its own sep_token_id, which a language model does not use


def test_every_family_has_one_context_length() -> None:
    """Training, generation, export and scoring ask the same function, whatever the family calls the number."""
    small = {"d_model": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": 64}
    mpt = build_model(type="mpt", config_overrides=small, vocab_size=V, block_size=64, seed=0)
    assert context_length(mpt) == context_length(mpt.config) == 64
    assert (
        context_length(build_model(type="gpt2", config_overrides=GPT2, vocab_size=V, block_size=64, seed=0))
        == 64
    )
    # RoBERTa's first position is the row after that of the padding token.
    roberta = build("roberta", LLAMA | {"max_position_embeddings": 64}, block_size=60)
    assert context_length(roberta) == 60
    roberta(input_ids=torch.full((1, 60), 9))
    with pytest.raises(RequestError, match=r"data.block_size 61 is more than the model's context of 60"):
        build("roberta", LLAMA | {"max_position_embeddings": 64}, block_size=61)
    assert context_length(nn.Linear(2, 2)) is None
    own = nn.Linear(2, 2)
    own.block_size = 32
    assert context_length(own) == 32


# ------------------------------------------------------------------------------------------------- pretrained


def save(model: Any, folder: Path) -> Path:
    model.config.vocab_size = model.get_output_embeddings().weight.shape[0]
    model.save_pretrained(folder)
    return folder


def test_from_pretrained_keeps_the_logits(tmp_path: Path) -> None:
    source = build("llama", vocab_size=128).eval()
    folder = save(source, tmp_path / "model")
    loaded = build("llama", {}, from_pretrained=str(folder), vocab_size=V)
    assert loaded.real_vocab_size == 128  # the model's own, though this tokenizer uses fewer
    assert not loaded.config.use_cache
    ids = batch()["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=ids).logits, source(input_ids=ids).logits)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "own.Own"}})
    )
    notes: list[str] = []
    build("llama", {}, from_pretrained=str(folder), vocab_size=V, note=notes.append)
    assert "code of its own (auto_map), which is not run: LlamaConfig" in notes[0]
    with pytest.raises(RequestError, match="knows 128 tokens, the tokenizer has 200"):
        build("llama", {}, from_pretrained=str(folder), vocab_size=200)
    with pytest.raises(RequestError, match="num_layers"):
        build("llama", {"num_layers": 3}, from_pretrained=str(folder))
    with pytest.raises(
        RequestError, match=r"the weight model\.layers\.2\.\S+ and 8 more are not in its files"
    ):
        build("llama", {"num_hidden_layers": 3}, from_pretrained=str(folder))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft about transformers
def test_from_pretrained_with_an_adapter_beside_the_weights_is_refused(tmp_path: Path) -> None:
    """transformers applies it and freezes everything: the refusal was that of optim.freeze, which nobody had given."""
    peft = pytest.importorskip("peft")
    model = build("llama", vocab_size=128)
    folder = save(model, tmp_path / "model")
    model.name_or_path = str(folder)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    peft.get_peft_model(model, config).save_pretrained(folder)
    with pytest.raises(RequestError, match="holds an adapter"):
        build("llama", {}, from_pretrained=str(folder))


def test_hub_revision_is_pinned_for_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of the Hub, with two commits of one model; ``main`` moves on while it is being loaded."""
    from transformers import AutoModelForCausalLM

    cache, commits = tmp_path / "models--owner--name", ("a" * 40, "b" * 40)
    for seed, commit in enumerate(commits):
        save(build("gpt2", vocab_size=128, seed=seed), cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commits[0])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    load = AutoModelForCausalLM.from_pretrained

    def later(*words: Any, **options: Any) -> Any:
        (cache / "refs" / "main").write_text(commits[1])
        return load(*words, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", later)
    notes: list[str] = []
    model = build("gpt2", {}, from_pretrained="owner/name", vocab_size=128, note=notes.append)
    expected = build("gpt2", vocab_size=128, seed=0)
    assert torch.equal(model.get_input_embeddings().weight, expected.get_input_embeddings().weight)
    assert notes[0] == f"owner/name: commit {commits[0]} (give model.revision to pin it)"
    build("gpt2", {}, from_pretrained="owner/name", revision=commits[1], vocab_size=128, note=notes.append)
    assert notes[-1] == f"owner/name: commit {commits[1]}"


def test_from_pretrained_vocabulary_is_padded_with_zeros_and_cut_on_export(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    source = GPT2LMHeadModel(GPT2Config(**GPT2, vocab_size=V)).eval()
    source.save_pretrained(tmp_path / "model")
    loaded = build("gpt2", {}, from_pretrained=str(tmp_path / "model"))
    assert loaded.config.vocab_size == 128
    assert loaded.get_input_embeddings().weight[V:].eq(0).all()
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    b = batch()
    loss_sum, _ = m.ModelWithLoss(loaded).eval()(**b)
    torch.testing.assert_close(loss_sum, reference(source, b), rtol=1e-5, atol=1e-4)
    exported = dict(m.export_state(loaded.state_dict().items(), source))
    assert all(torch.equal(exported[name], tensor) for name, tensor in source.state_dict().items())


@pytest.mark.parametrize(
    "key",
    [
        {"_attn_implementation_internal": "someone/kernel"},
        {"_experts_implementation_internal": "x"},
        {"attn_implementation": "someone/kernel"},
        {"text_config": {"trust_remote_code": True}},
    ],
)
def test_unsafe_config_is_refused_before_loading(key: dict[str, Any], tmp_path: Path) -> None:
    folder = save(build("llama", vocab_size=128), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | key))
    with pytest.raises(RequestError, match="unsafe key"):
        build("llama", {}, from_pretrained=str(folder))


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    model = build("llama", vocab_size=128)
    folder = save(model, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(RequestError, match="safetensors"):
        build("llama", {}, from_pretrained=str(folder))


# --------------------------------------------------------------------------------------- the user's own parts


class Regression(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, 1)

    def forward(self, features: Tensor) -> Tensor:
        for layer in self.layers:
            features = features + layer(features).relu()
        return self.out(features).squeeze(-1)


class Classifier(nn.Module):
    def __init__(self, vocab_size: int, block_size: int, seed: int, depth: int = 1) -> None:
        super().__init__()
        self.given = (vocab_size, block_size, seed, depth)
        self.embed = nn.Embedding(vocab_size, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, ids: Tensor, weight: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.out(self.embed(ids).mean(1))}


class OwnLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 1)

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        from types import SimpleNamespace

        return SimpleNamespace(loss=(self.out(x).squeeze(-1) - labels).square().mean())


def squared_error(outputs: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return (outputs - batch["labels"]).square().sum(), torch.tensor(batch["labels"].numel())


def test_own_model_and_own_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    module = m.ModelWithLoss(Regression(), loss_factory=squared_error)
    x, y = torch.randn(6, 4), torch.randn(6)
    loss_sum, count = module(features=x, labels=y)
    assert module.head_path == "factory"
    assert int(count) == 6
    torch.testing.assert_close(loss_sum, (module.model(x) - y).square().sum())
    loss_sum.backward()
    monkeypatch.setitem(__import__("sys").modules, "user_parts", __import__("types").ModuleType("user_parts"))
    __import__("sys").modules["user_parts"].squared_error = squared_error
    plain = m.ModelWithLoss(Regression(), loss_factory=lambda outputs, batch: (outputs.sum(), 6))
    assert int(plain(features=x, labels=y)[1]) == 6, "a number counts as well as a tensor"
    for wrong in (lambda o, b: o.sum(), lambda o, b: (o, 6), lambda o, b: (o.sum(), 6, 7)):
        with pytest.raises(RequestError, match=r"must return \(sum, count\)"):
            m.ModelWithLoss(Regression(), loss_factory=wrong)(features=x, labels=y)
    notes: list[str] = []
    other = m.ModelWithLoss(Regression(), loss_factory=lambda o, b: (o.sum(), 2), note=notes.append)
    for _ in range(2):
        other(features=x, labels=y)
    assert len(notes) == 1
    assert "counts 2 where the batch has 6 labels" in notes[0]
    by_path = m.ModelWithLoss(Regression(), loss_factory="user_parts:squared_error")
    assert by_path.loss_factory is squared_error


def counts_every_label(outputs: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """The natural port of a Lightning loss: right for full batches, and it counts ignored labels."""
    return F.cross_entropy(outputs, batch["labels"], reduction="sum"), batch["labels"].numel()


def test_own_loss_never_sees_the_rows_that_fill_up_an_evaluation() -> None:
    torch.manual_seed(0)
    module = m.ModelWithLoss(nn.Linear(4, 3), loss_factory=counts_every_label).eval()
    x, y = torch.randn(6, 4), torch.tensor([0, 2, 1, 0, 1, 2])
    exact, six = module(input=x, labels=y)
    filled = torch.cat([y, torch.full((2,), IGNORED_LABEL)])
    loss_sum, count = module(input=torch.cat([x, x[:2]]), labels=filled)
    assert int(count) == int(six) == 6
    torch.testing.assert_close(loss_sum, exact)
    nothing, zero = module(input=x, labels=torch.full((6,), IGNORED_LABEL))
    assert float(nothing.detach()) == int(zero) == 0
    # Sequences: a row counts as soon as one of its labels does.
    words = m.ModelWithLoss(
        nn.Embedding(5, 5), loss_factory=lambda o, b: (o.sum() * 0 + len(o), len(o))
    ).eval()
    rows = torch.tensor([[1, IGNORED_LABEL], [IGNORED_LABEL, IGNORED_LABEL]])
    assert int(words(input=torch.zeros(2, 2, dtype=torch.int64), labels=rows)[1]) == 1


def test_model_factory_gets_the_arguments_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    parts = types.ModuleType("user_parts")
    parts.Classifier = Classifier
    monkeypatch.setitem(sys.modules, "user_parts", parts)
    notes: list[str] = []
    model = build(overrides={"depth": 2}, factory="user_parts:Classifier", seed=5, note=notes.append)
    assert model.given == (V, 32, 5, 2)
    assert len(notes) == 1  # its initialization is its own
    again = build(overrides={"depth": 2}, factory="user_parts:Classifier", seed=5)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))
    with pytest.raises(RequestError, match="did you mean 'depth'"):
        build(overrides={"dept": 2}, factory="user_parts:Classifier")
    module = m.ModelWithLoss(model, label_smoothing=0.1)
    ids, labels = torch.randint(0, V, (4, 5)), torch.tensor([0, 2, IGNORED_LABEL, 1])
    loss_sum, count = module(ids=ids, labels=labels)
    expected = F.cross_entropy(model(ids)["logits"], labels, reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(loss_sum, expected)
    assert int(count) == 3


def test_model_with_its_own_loss() -> None:
    module = m.ModelWithLoss(OwnLoss())
    x, y = torch.randn(6, 4), torch.randn(6)
    loss_sum, count = module(x=x, labels=y)
    torch.testing.assert_close(loss_sum / count, (module.model.out(x).squeeze(-1) - y).square().mean())


def test_unknown_batch_keys_missing_labels_and_masks_are_refused() -> None:
    module = m.ModelWithLoss(Regression(), loss_factory=squared_error)
    with pytest.raises(RequestError, match=r"\(feature\) of Regression.forward; did you mean 'features'"):
        module(feature=torch.randn(2, 4), labels=torch.randn(2))
    lm = m.ModelWithLoss(build())
    b = batch()
    with pytest.raises(RequestError, match=r"not arguments \(tokens\)"):
        lm(**b, tokens=b["input_ids"])
    with pytest.raises(RequestError, match="no 'labels'"):
        lm(input_ids=b["input_ids"])
    with pytest.raises(RequestError, match="switches packing by position_ids off"):
        lm(**b, attention_mask=torch.ones(2, 16), position_ids=torch.arange(16).expand(2, -1))
    with pytest.raises(RequestError, match=r"give loss\.factory"):
        m.ModelWithLoss(Regression())(features=torch.randn(2, 4), labels=torch.randn(2))


def test_smoothing_and_z_loss_are_for_training_only() -> None:
    module = m.ModelWithLoss(build("llama"), label_smoothing=0.1, z_loss=1e-2)
    plain = m.ModelWithLoss(build("llama"))
    b = batch()
    assert torch.equal(module.eval()(**b)[0], plain.eval()(**b)[0])
    assert float((module.train()(**b)[0] - plain.train()(**b)[0]).detach()) > 1
    for wrong in ({"label_smoothing": 1.0}, {"z_loss": -1.0}):
        with pytest.raises(RequestError, match="loss"):
            m.ModelWithLoss(build("llama"), **wrong)


def test_mixture_of_experts_adds_its_balance_loss_in_training() -> None:
    overrides = {**FAMILIES["mixtral"], "output_router_logits": True, "router_aux_loss_coef": 0.5}
    notes: list[str] = []
    module = m.ModelWithLoss(build("mixtral", overrides), note=notes.append)
    assert module.head_path == "logits"
    assert "balance" in notes[0]
    b = batch()
    trained, count = module.train()(**b)
    evaluated, _ = module.eval()(**b)
    aux = module.model(input_ids=b["input_ids"], output_router_logits=True).aux_loss
    torch.testing.assert_close(trained - evaluated, 0.5 * aux * count, rtol=1e-3, atol=1e-3)


def test_weight_of_the_balance_loss_is_found_under_the_familys_name() -> None:
    fields = {"hidden_size": 32, "num_hidden_layers": 2, "num_key_value_heads": 2, "kv_channels": 8}
    more = {
        "intermediate_size": 48,
        "num_local_experts": 4,
        "output_router_logits": True,
        "aux_loss_coef": 0.5,
    }
    module = m.ModelWithLoss(build("jetmoe", fields | more))
    b = batch()
    trained, count = module.train()(**b)
    evaluated, _ = module.eval()(**b)
    aux = module.model(input_ids=b["input_ids"], output_router_logits=True).aux_loss
    torch.testing.assert_close(trained - evaluated, 0.5 * aux * count, rtol=1e-3, atol=1e-3)


def test_balance_loss_without_a_known_weight_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(m, "_BALANCE_WEIGHTS", ("other",))
    model = build("mixtral", {**FAMILIES["mixtral"], "output_router_logits": True})
    with pytest.raises(RequestError, match=r"model\.config\.output_router_logits .* leave it out"):
        m.ModelWithLoss(model)


# ---------------------------------------------------------------------------------------------------- regions


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_activation_checkpointing_gives_the_same_gradients_with_dropout(family: str, every: int) -> None:
    overrides = {
        **FAMILIES[family],
        **({"attention_dropout": 0.3} if family == "llama" else {"resid_pdrop": 0.3}),
    }
    plain = m.ModelWithLoss(build(family, overrides))
    recomputed = m.ModelWithLoss(build(family, overrides))
    assert m.enable_activation_checkpointing(recomputed.model, every=every) == 2 // every
    for module in (plain, recomputed):
        torch.manual_seed(5)
        module.train()(**batch())[0].backward()
    for (name, p), q in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-6, msg=name)
    with pytest.raises(RequestError, match="no repeated layers"):
        m.enable_activation_checkpointing(nn.Linear(2, 2))


def test_decoder_layers_of_any_model() -> None:
    assert [type(layer).__name__ for layer in m.decoder_layers(build())] == ["GPT2Block"] * 2
    assert len(m.decoder_layers(Regression())) == 3
    assert m.decoder_layers(nn.Linear(2, 2)) == []
    assert m.ModelWithLoss(Regression())._no_split_modules == {"Linear"}


def test_deep_copy_is_independent() -> None:
    module = m.ModelWithLoss(build(), chunk=4).eval()
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    b = batch()
    assert float(twin(**b)[0].detach()) == pytest.approx(32 * float(torch.tensor(float(V)).log()), rel=1e-5)
    assert float(module(**b)[0].detach()) != float(twin(**b)[0].detach())
