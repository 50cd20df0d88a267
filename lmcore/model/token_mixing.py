"""How a model mixes tokens, found by running it: whether plain causal attention is the only place.

Separating documents by sequence lengths, and computing parts of a block on several ranks, is correct only for a model whose
tokens interact in plain causal attention and nowhere else. This is tested, not taken from a list of families: the model runs
over four tokens with an attention in which each token sees only itself; then no token may depend on another one.
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
    """Why documents must be separated by a mask for this model; ``None`` if sequence lengths are enough.

    Args:
        model: not yet wrapped, inside a :class:`~lmcore.model.module.ModelWithLoss` or not; empty weights are replaced
            by random ones.
    """
    model = _user_model(model)
    if (reason := _no_own_attention(model)) is not None:
        return reason
    # mypy takes every attribute of a torch module for a tensor or a module.
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    for name in ("sliding_window", "attention_chunk_size"):
        window = getattr(config, name, None)
        if isinstance(window, int) and 0 < window <= block_size:  # 0 in Qwen2 MoE means no window
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
    """Why blocks of this model cannot be split over several ranks; ``None`` if they can."""
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
    """Why a transformers model cannot be trained to predict the next token; ``None`` if it can, or if it cannot be tested.

    Either it does not run with token ids alone, which are its only input in training, or a token depends on a later one, and
    so on its own label. Tested on eight tokens in evaluation mode; GPU kernels are not tested on a CPU.
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
    """Whether passing positions 0, 1, 2, ... differs from passing none: RoBERTa counts from after the padding token."""
    positions = torch.arange(2 * _TOKENS)[None].expand(len(_OTHER_IDS), -1)
    own = _tried(model, lambda: model.base_model(input_ids=_OTHER_IDS)[0])
    given = _tried(model, lambda: model.base_model(input_ids=_OTHER_IDS, position_ids=positions)[0])
    return own is not None and given is not None and _differs(own, given)


def _error_with_token_ids_alone(model: Any) -> str | None:
    """The error of a model that could not be tested, given at most as many tokens as its context and vocabulary allow."""
    training = model.training
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(min(8, context_length(model) or 8, vocabulary))[None]
    try:
        with torch.no_grad():
            model.eval()
            model.base_model(input_ids=ids)
    except Exception as error:  # a family may require other arguments, and raise any error
        kind, name = error.__class__.__name__, model.__class__.__name__
        return f"{name} does not compute with token ids alone: {kind}: {message_of(error)}"
    finally:
        model.train(training)
    return None


def how_documents_meet(model: nn.Module, *, sequence_lengths: bool) -> str | None:
    """How a token depends on another document of its block although documents are separated; ``None`` if it does not.

    ``"everywhere"``: the separation has no effect. ``"elsewhere"``: outside of what is separated, for example in a state or a
    convolution. ``"by position"``: given positions mean something else than those that the model counts itself.
    Tested on two documents of four tokens; ``None`` also if the model cannot be tested.

    Args:
        sequence_lengths: documents are separated by sequence lengths; otherwise by a mask that the model derives from
            ``position_ids``.
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
"""Rows of two documents of four tokens: the original, one with another first document, one with another last token."""


def _tried(model: Any, run: Callable[[], Tensor]) -> Tensor | None:
    """The hidden states that ``run`` computes in evaluation mode, or ``None`` if it fails.

    Parameters that are empty or all zero are replaced by random ones."""
    training = model.training
    try:
        with torch.no_grad(), random_weights(list(model.base_model.modules()), zeros=True):
            model.eval()
            return run()
    except Exception:
        # A family may require any arguments and raise any error. If token ids alone are not enough, why_no_language_model
        # refuses the model with its error; anything else that it does not accept fails at the first step.
        return None
    finally:
        model.train(training)


def _differs(one: Tensor, other: Tensor) -> bool:
    # For equal inputs only the order of sums, in routed experts, may differ.
    return bool((one - other).abs().max() > 1e-5 * one.abs().max())


def attention_dropout(model: nn.Module) -> float:
    """The probability of dropping attention weights in training."""
    config = getattr(_user_model(model), "config", None)
    return float(getattr(config, "attn_pdrop", None) or getattr(config, "attention_dropout", None) or 0.0)


def _user_model(module: nn.Module) -> Any:
    """The model inside a module with a loss, or the module itself."""
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
    """The arguments of each attention call of a forward, and where else tokens interact (``None``: nowhere).

    The first is a string, the reason, if the model cannot run."""
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
    except Exception as error:  # a family may require other arguments, and raise any error
        return f"{model.__class__.__name__} could not be tried ({error.__class__.__name__})", None
    finally:
        model.train(training)
        AttentionInterface.register(ATTENTION, attention)
    # Other rows may change a result by rounding at most.
    close = torch.allclose(plain[1:], first[1:], rtol=1e-3, atol=1e-5)
    if not (close and torch.allclose(plain[:-1], last[:-1], rtol=1e-3, atol=1e-5)):
        return (
            seen,
            "its tokens also meet outside of attention (a state, a convolution or a shift over the block)",
        )
    return seen, None
