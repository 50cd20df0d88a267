"""A document mask gives each document its own attention: flash attention by sequence lengths, sdpa by a mask; both equal
the documents alone, forward and backward."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel
from transformers import modeling_flash_attention_utils as flash
from transformers.integrations import flash_attention

from lmcore.data.batches import Batches, EvalBatches
from lmcore.data.blocks import StoreBlocks
from lmcore.data.context import Context
from lmcore.data.cursor import Cursor
from lmcore.errors import RequestError
from lmcore.model.module import ModelWithLoss
from tests.support.data import counting_store

T = 24
CONFIGS = {
    "gpt2": GPT2Config(
        vocab_size=512,
        n_positions=T,
        n_embd=32,
        n_layer=2,
        n_head=4,
        resid_pdrop=0,
        attn_pdrop=0,
        embd_pdrop=0,
    ),
    "llama": LlamaConfig(  # rotary positions and groups of heads
        vocab_size=512,
        max_position_embeddings=T,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
}


def varlen_on_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """flash_attn_varlen_func, document by document; (tokens, heads, width)."""
    assert causal
    assert cu_seqlens_q[0] == 0
    assert cu_seqlens_q[-1] == len(q)
    assert int(cu_seqlens_q.diff().max()) <= max_seqlen_q
    out = []
    for start, stop in pairwise(cu_seqlens_q.tolist()):
        one = (part[start:stop].transpose(0, 1)[None] for part in (q, k, v))
        if stop > start:
            mixed = scaled_dot_product_attention(*one, is_causal=True, scale=softmax_scale, enable_gqa=True)
            out.append(mixed[0].transpose(0, 1))
    return torch.cat(out)


def not_called(*args: Any, **kwargs: Any) -> Tensor:
    raise AssertionError("the kernel without document borders was called")


@pytest.fixture
def flash_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    process = flash._lazy_define_process_function(varlen_on_cpu)
    kernels = ((not_called, varlen_on_cpu, None, None, None), (process, dict))
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *args, **kwargs: kernels)
    # On a GPU it runs under autocast, which says the type; here all is float32.
    monkeypatch.setattr(flash_attention, "get_target_dtype", lambda query, module: None)


def model(family: str, attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(CONFIGS[family], attn_implementation="sdpa")
    made.config.use_cache = False  # as lmcore.model.build sets it
    made.config._attn_implementation_internal = attention  # the setter asks for a GPU
    return made


def loss_and_gradients(
    module: ModelWithLoss, batches: list[dict[str, Any]]
) -> tuple[float, int, list[Tensor]]:
    module.zero_grad()
    total, labels = 0.0, 0
    for batch in batches:
        loss_sum, count = module(**batch)
        loss_sum.backward()
        total, labels = total + loss_sum.item(), labels + int(count)
    return total, labels, [p.grad.clone() for p in module.parameters() if p.grad is not None]


def separate_documents(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    alone = []
    for ids, labels, places in zip(batch["input_ids"], batch["labels"], batch["position_ids"]):
        borders = [*np.flatnonzero(places.numpy() == 0).tolist(), len(ids)]
        alone += [{"input_ids": ids[None, a:b], "labels": labels[None, a:b]} for a, b in pairwise(borders)]
    return alone


@pytest.mark.parametrize("family", list(CONFIGS))
@pytest.mark.parametrize("documents", [2, 7, 100])
@pytest.mark.usefixtures("flash_on_cpu")
def test_packed_documents_equal_separate_documents(family: str, documents: int, tmp_path: Path) -> None:
    """Micro-batches of several blocks, whose position ids alone flash attention would ignore."""
    store = counting_store(tmp_path, 500, documents=documents)
    blocks = StoreBlocks([store], block_size=T, seed=3, document_mask=True)
    cursor = Cursor(fingerprint=blocks.fingerprint, seed=3)
    sizes = {"global_batch_blocks": 6, "micro_batch_blocks": 3}
    steps = [
        next(iter(Batches(blocks, cursor=cursor, context=Context(sequence_lengths=wanted), **sizes)))
        for wanted in (False, True)
    ]
    masked, flashed = (step.micro_batches for step in steps)
    assert "cu_seq_lens_q" not in masked[0]
    dense = loss_and_gradients(ModelWithLoss(model(family, "sdpa")), masked)
    varlen = loss_and_gradients(ModelWithLoss(model(family, "flash_attention_2")), flashed)
    own = loss_and_gradients(ModelWithLoss(model(family, "sdpa")), flashed)
    alone = loss_and_gradients(
        ModelWithLoss(model(family, "sdpa")), [one for batch in masked for one in separate_documents(batch)]
    )
    for found in (dense, varlen, own):
        assert found[1] == alone[1] == 6 * T
        assert found[0] == pytest.approx(alone[0], rel=1e-6)
        for one, other in zip(found[2], alone[2], strict=True):
            assert torch.allclose(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("documents", [0, 3, 16, 40])
def test_sequence_lengths_have_one_shape_and_name_every_document(documents: int, tmp_path: Path) -> None:
    """Compiled layers would be compiled again for each new shape; padding repeats the end, as empty documents."""
    store = counting_store(tmp_path, 3000, documents=documents)
    blocks = StoreBlocks([store], block_size=64, document_mask=True, tails=True)
    shapes = set()
    for batch in EvalBatches(blocks, micro_batch_blocks=4, context=Context(sequence_lengths=True)):
        lengths = batch["cu_seq_lens_q"]
        assert torch.equal(lengths, batch["cu_seq_lens_k"])
        assert lengths.dtype == torch.int32
        assert (int(lengths[0]), int(lengths[-1])) == (0, 4 * 64)
        rebuilt = torch.cat([torch.arange(count) for count in lengths.diff().tolist()])
        assert torch.equal(rebuilt, batch["position_ids"].ravel())
        assert batch["max_length_q"] == batch["max_length_k"] == 64
        shapes.add(tuple(lengths.shape))
    if documents != 3:  # very short documents take a larger shape
        assert shapes == {(4 * 64 // 16 + 1,)}


def engine_of(device: str = "cpu", precision: str = "fp32", context_parallel: int = 1) -> Any:
    return SimpleNamespace(
        context_parallel=context_parallel,
        context_rank=0,
        is_main=True,
        device=torch.device(device),
        precision=precision,
        broadcast_object=lambda value: value,
    )


@pytest.mark.parametrize(
    ("attention", "mask", "engine", "wanted", "said"),
    [
        ("flash_attention_2", True, engine_of("cuda", "bf16"), True, ""),
        ("flash_attention_3", True, engine_of("cuda", "bf16"), True, ""),
        ("flash_attention_2", False, engine_of("cuda", "bf16"), False, ""),
        ("sdpa", True, engine_of(), True, ""),
        ("sdpa", True, engine_of("cuda", "bf16"), True, ""),
        ("sdpa", False, engine_of(), False, ""),
        ("eager", True, engine_of(), False, ""),
        ("sdpa", True, engine_of("cuda", "fp32"), False, "bf16 and fp16 only"),
    ],
)
def test_run_keeps_documents_apart_by_sequence_lengths_where_it_can(
    attention: str, mask: bool, engine: Any, wanted: bool, said: str
) -> None:
    from lmcore.config import parse
    from lmcore.run.setup import context_of

    words = ["--data.train", "x", "--run_dir", "x", "--data.document_mask", str(mask).lower()]
    config = parse.parse([*words, "--data.block_size", str(T), "--model.config.n_positions", str(T)])
    notes: list[str] = []
    made = context_of(config, engine, ModelWithLoss(model("gpt2", attention)), note=notes.append)
    assert made == Context(sequence_lengths=wanted)
    assert len(notes) == bool(said)
    assert said in "".join(notes)


def test_run_says_where_documents_meet_all_the_same() -> None:
    from lmcore.config import parse
    from lmcore.run.setup import build_model, context_of

    words = ["--data.train", "x", "--run_dir", "x", "--data.document_mask", "true", "--data.block_size", "16"]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    words += [f"--model.config.{name}={value}" for name, value in sizes.items()]

    def said_of(family: str, *more: str) -> list[str]:
        config = parse.parse([*words, "--model.type", family, *more], default_recipe=None)
        ids = {"pad_token_id": 3}
        module = build_model(config, vocab_size=64, special_ids=ids, block_size=16, note=lambda line: None)
        notes: list[str] = []
        context_of(config, engine_of(), module, note=notes.append)
        return notes

    assert said_of("llama") == []
    (note,) = said_of(
        "lfm2", "--model.config.num_key_value_heads=1", "--model.config.layer_types=[conv, full_attention]"
    )
    assert "another part of it" in note
    with pytest.raises(RequestError, match=r"data\.document_mask does nothing in GptOssForCausalLM"):
        said_of("gpt_oss", "--model.config.num_local_experts=4", "--model.config.num_key_value_heads=1")
    with pytest.raises(RequestError, match=r"RobertaForCausalLM counts its own from another number"):
        said_of("roberta")
