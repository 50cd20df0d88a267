"""How a model mixes tokens, found by trying: whether attention by sequence lengths is all there is.

Keeping documents apart by sequence lengths, and computing parts of a block on several ranks, is right only for a model whose
tokens meet in plain causal attention and nowhere else. No list of families says so: the model runs over four tokens with an
attention in which each token sees only itself; then no token may depend on another one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lmcore.humanize import message_of
from lmcore.model.build import random_weights
from lmcore.model.config import context_length
from lmcore.model.cpu_kernels import ATTENTION, attention

_TOKENS = 4


def why_no_sequence_lengths(model: nn.Module, block_size: int) -> str | None:
    """Why documents of this model must be kept apart by a mask; ``None`` if sequence lengths do it.

    Args:
        model: before it is wrapped, in a :class:`~lmcore.model.module.ModelWithLoss` or not; empty weights are taken
            as random.
    """
    model = _user_model(model)
    if (reason := _no_own_attention(model)) is not None:
        return reason
    # To mypy an attribute of a torch module is a tensor or a module.
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    for name in ("sliding_window", "attention_chunk_size"):
        window = getattr(config, name, None)
        if isinstance(window, int) and 0 < window <= block_size:  # 0: Qwen2 MoE has none
            return f"its attention has a window of {window} ({name}), no longer than a block ({block_size})"
    seen, _ = _run(model)
    if isinstance(seen, str):
        return seen
    if not seen:
        return f"{model.__class__.__name__} computes attention in code of its own"
    for call in seen:
        if "cu_seq_lens_q" not in call:
            return f"{model.__class__.__name__} does not hand sequence lengths on to its attention"
        extra = [name for name in ("position_bias", "softcap", "s_aux") if call.get(name) is not None]
        if extra or call["mask"] is not None or call.get("is_causal") is False:
            return f"its attention is not plain causal attention ({extra[0] if extra else 'a mask'})"
    return None


def why_no_context_parallel(model: nn.Module, block_size: int) -> str | None:
    """Why blocks of this model cannot be shared by several ranks; ``None`` if they can."""
    model = _user_model(model)
    if (reason := why_no_sequence_lengths(model, block_size)) is not None:
        return reason
    if getattr(model.config, "output_router_logits", False):
        return "the balance loss of its experts is a mean over whole blocks"
    if _counts_otherwise(model):
        return f"{model.__class__.__name__} counts positions from another number than 0"
    _, mixed = _run(model)
    return mixed


def why_no_language_model(model: nn.Module) -> str | None:
    """Why a model of transformers cannot be trained to predict the next token; ``None`` if it can, or cannot be tried.

    It does not compute with token ids alone, which is all that it gets in training, or a token depends on a later one, and so
    on its own label. Tried on eight tokens in evaluation mode; kernels of a GPU are not tried on a CPU.
    """
    model = _user_model(model)
    config: Any = getattr(model, "config", None)
    body: Any = getattr(model, "base_model", None)
    if body is None or str(getattr(config, "_attn_implementation", None)).startswith(("flash", "flex")):
        return None
    whole = {"input_ids": _OTHER_IDS}
    found = _tried(model, lambda: body(**whole)[0])
    if found is None:
        return _error_with_token_ids_alone(model)
    if _differs(found[0, :-1], found[2, :-1]):
        return f"{model.__class__.__name__} sees the tokens that it must predict: it is not causal"
    return None


def _counts_otherwise(model: Any) -> bool:
    """Whether positions 0, 1, 2, ... that are given mean something else than none: RoBERTa begins after the padding token."""
    positions = torch.arange(2 * _TOKENS)[None].expand(len(_OTHER_IDS), -1)
    own = _tried(model, lambda: model.base_model(input_ids=_OTHER_IDS)[0])
    given = _tried(model, lambda: model.base_model(input_ids=_OTHER_IDS, position_ids=positions)[0])
    return own is not None and given is not None and _differs(own, given)


def _error_with_token_ids_alone(model: Any) -> str | None:
    """What a model that could not be tried says to no more tokens than its context and its vocabulary have."""
    training = model.training
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(min(8, context_length(model) or 8, vocabulary))[None]
    try:
        with torch.no_grad():
            model.eval()
            model.base_model(input_ids=ids)
    except Exception as error:  # any family may want any other arguments
        kind, name = error.__class__.__name__, model.__class__.__name__
        return f"{name} does not compute with token ids alone: {kind}: {message_of(error)}"
    finally:
        model.train(training)
    return None


def how_documents_meet(model: nn.Module, *, sequence_lengths: bool) -> str | None:
    """How a token depends on another document of its block although documents are to be kept apart; ``None`` if it does not.

    ``"everywhere"``: as it would without. ``"elsewhere"``: outside of what keeps them apart, in a state or a convolution,
    say. ``"by position"``: positions that are given mean something else than those that the model counts itself.
    ``None`` also where it cannot be tried, on two documents of four tokens.

    Args:
        sequence_lengths: documents are kept apart by these, and else by a mask that the model makes of ``position_ids``.
    """
    from lmcore.model.module import _packing_known

    model = _user_model(model)
    body, rows = getattr(model, "base_model", None), len(_OTHER_IDS)
    if body is None:
        return None
    batch: dict[str, Any] = {
        "input_ids": _OTHER_IDS,
        "position_ids": torch.arange(_TOKENS).repeat(rows, 2),
    }
    if sequence_lengths:
        borders = torch.arange(0, 2 * _TOKENS * rows + 1, _TOKENS, dtype=torch.int32)
        batch |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
        batch |= {"max_length_q": _TOKENS, "max_length_k": _TOKENS}

    def run(packed: bool) -> Tensor:
        with _packing_known(packed):
            return body(**batch)[0]

    if _counts_otherwise(model):
        return "by position"
    found = _tried(model, lambda: run(not sequence_lengths))
    if found is None or not _differs(found[0, _TOKENS:], found[1, _TOKENS:]):
        return None
    if not sequence_lengths:
        without = _tried(model, lambda: run(False))
        if without is not None and not _differs(found, without):
            return "everywhere"
    return "elsewhere"


_OTHER_IDS = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [5, 2, 3, 6, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 3]])
"""Two documents of four tokens: as they are, with another first document, with another last token."""


def _tried(model: Any, run: Callable[[], Tensor]) -> Tensor | None:
    """The hidden states that ``run`` computes in evaluation mode, empty weights and zeros taken as random; ``None``: it cannot."""
    training = model.training
    try:
        with torch.no_grad(), random_weights(list(model.base_model.modules()), zeros=True):
            model.eval()
            return run()
    except Exception:
        # Any family may take any arguments, and raise anything. One that does not take token ids alone is refused with its
        # error by why_no_language_model; what else it does not take, its first step refuses.
        return None
    finally:
        model.train(training)


def _differs(one: Tensor, other: Tensor) -> bool:
    # Equal tokens before equal tokens: nothing but the order of sums, in routed experts, may differ.
    return bool((one - other).abs().max() > 1e-5 * one.abs().max())


def attention_dropout(model: nn.Module) -> float:
    """The probability of dropping attention weights in training."""
    config = getattr(_user_model(model), "config", None)
    return float(getattr(config, "attn_pdrop", None) or getattr(config, "attention_dropout", None) or 0.0)


def _user_model(module: nn.Module) -> Any:
    """The model inside of a module with a loss."""
    return getattr(module, "model", module) if hasattr(module, "head_path") else module


def _no_own_attention(model: Any) -> str | None:
    name = model.__class__.__name__
    chosen = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if not hasattr(model, "base_model") or chosen is None:
        return f"{name} is not a model of transformers with its attention interface"
    if chosen == "sdpa":
        return f"the code of {name} asks for sdpa by its name, so that no other attention can take its place"
    if chosen != ATTENTION:
        return f"its attention is {chosen}, not sdpa"
    return None


def _run(model: Any) -> tuple[list[dict[str, Any]] | str, str | None]:
    """What each attention call of a forward gets, and whether tokens meet anywhere else. A string: it cannot run."""
    from transformers import AttentionInterface

    seen: list[dict[str, Any]] = []

    def only_itself(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **more: Any
    ) -> tuple[Tensor, None]:
        seen.append({**more, "mask": mask})
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(
            1, 2
        ).contiguous(), None

    body, training = model.base_model, model.training
    lengths = torch.tensor([0, _TOKENS], dtype=torch.int32)
    batch = {
        "position_ids": torch.arange(_TOKENS)[None],
        "cu_seq_lens_q": lengths,
        "cu_seq_lens_k": lengths,
        "max_length_q": _TOKENS,
        "max_length_k": _TOKENS,
    }

    def hidden(ids: list[int]) -> Tensor:
        return body(input_ids=torch.tensor([ids]), **batch)[0][0]

    from lmcore.model.module import _packing_known

    AttentionInterface.register(ATTENTION, only_itself)
    try:
        with torch.no_grad(), random_weights(list(body.modules()), zeros=True), _packing_known(False):
            model.eval()
            plain, first, last = hidden([1, 2, 3, 4]), hidden([5, 2, 3, 4]), hidden([1, 2, 3, 5])
    except Exception as error:  # any family may do anything with four tokens, and take any arguments
        return f"{model.__class__.__name__} could not be tried ({error.__class__.__name__})", None
    finally:
        model.train(training)
        AttentionInterface.register(ATTENTION, attention)
    # Rounding may depend on the shape of a product, never on the other rows by more than that.
    close = torch.allclose(plain[1:], first[1:], rtol=1e-3, atol=1e-5)
    if not (close and torch.allclose(plain[:-1], last[:-1], rtol=1e-3, atol=1e-5)):
        return (
            seen,
            "its tokens also meet outside of attention (a state, a convolution or a shift over the block)",
        )
    return seen, None
