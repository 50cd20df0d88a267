"""Prompts -> text, from any module that gives logits.

Comes in: a model, a tokenizer, prompts. Goes out: text, piece by piece as it is written. What always holds:
the same seed gives the same text, on any device with the same logits; a character is never shown half (a
piece of a byte-fallback tokenizer may be one byte of three); ids that only pad the vocabulary are never
drawn; the model's training mode is what it was before.

    >>> for piece in stream(model, tokenizer, "def ", 100, temperature=0.8, top_p=0.95, seed=1):
    ...     print(piece, end="", flush=True)

Letters: T tokens so far, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lmcore.errors import RequestError
from lmcore.model.config import context_length
from lmcore.model.module import ModelWithLoss

_HALF_CHARACTER = "\N{REPLACEMENT CHARACTER}"
_MOST_HELD_TOKENS = 8
"""A UTF-8 character has at most 4 bytes; what is still broken after more tokens is shown as it is."""


def sample(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    max_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """The continuation of each prompt; arguments as for :func:`stream`. Prompts do not depend on each
    other.
    """
    settings: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    return ["".join(stream(model, tokenizer, prompt, max_tokens, **settings)) for prompt in prompts]


def stream(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    max_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_at_eos: bool = True,
) -> Iterator[str]:
    """Continue ``prompt`` and yield the new text as it comes; what is out of range is refused at the call.

    Args:
        model: a transformers model, a :class:`~lmcore.model.module.ModelWithLoss`, or any module that takes
            ``input_ids`` (1, T) and returns logits (1, T, V), alone or as ``.logits`` or first field.
        tokenizer: :class:`lmcore.data.tokenizer.tokenizer.Tokenizer`. An empty prompt stands for the start of a document.
        max_tokens: of the continuation.
        temperature: 0 is greedy: always the most probable token.
        top_k: draw from the k most probable tokens; 0: from all.
        top_p: draw from the fewest tokens that hold this much probability (Holtzman et al. 2019,
            arXiv:1904.09751); 1: from all.
        seed: of the draws; the prompt enters too, so that equal prompts continue equally.

    Raises:
        RequestError: settings out of range, or logits that are not finite.
    """
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1 or max_tokens < 0:
        raise RequestError(
            f"temperature {temperature} must be 0 or more, top_k {top_k} 0 or more, top_p {top_p} above 0 "
            f"and at most 1, max_tokens {max_tokens} 0 or more"
        )
    digest = hashlib.sha256(f"lmcore generate {seed} {prompt}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    draw = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
    return _continued(model, tokenizer, prompt, max_tokens, draw, stop_at_eos=stop_at_eos)


def _continued(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    max_tokens: int,
    draw: dict[str, Any],
    *,
    stop_at_eos: bool,
) -> Iterator[str]:
    ids = list(tokenizer.encode(prompt)) or [tokenizer.eos_id]  # every document begins after an EOS
    start = len(ids)
    shown = start  # ids before it have been shown
    anchor = max(
        0, start - 4
    )  # decoding starts here: a piece may depend on its neighbours, not on the far past
    for token in _tokens(model, ids, max_tokens, draw):
        if stop_at_eos and token == tokenizer.eos_id:
            break
        ids.append(token)
        text = tokenizer.decode(ids[anchor:])
        if text.endswith(_HALF_CHARACTER) and len(ids) - shown < _MOST_HELD_TOKENS:
            continue
        yield text[len(tokenizer.decode(ids[anchor:shown])) :]
        anchor, shown = max(anchor, shown - 4), len(ids)
    if shown < len(ids):
        yield tokenizer.decode(ids[anchor:])[len(tokenizer.decode(ids[anchor:shown])) :]


def _tokens(
    model: nn.Module,
    prompt: Sequence[int],
    max_tokens: int,
    draw: dict[str, Any],
) -> Iterator[int]:
    """Token after token, by :func:`choose` with ``draw``. Beyond the model's context the older half is forgotten."""
    if isinstance(model, ModelWithLoss):
        model = model.model
    device = next(model.parameters()).device
    context = context_length(model)
    cached = hasattr(model, "prepare_inputs_for_generation")  # a transformers model: keys and values are kept
    window = list(prompt)
    fresh = window
    memory: Any = None
    for _ in range(max_tokens):
        if context is not None and len(window) > context:
            window = window[-(context + 1) // 2 :]
            fresh, memory = window, None
        if not cached:
            fresh = window
        with _asleep(model):
            inputs = {"input_ids": torch.tensor([fresh], device=device)}
            if cached:
                inputs |= {"use_cache": True, "past_key_values": memory}  # type: ignore[dict-item] # not tensors
            outputs = model(**inputs)
        memory = getattr(outputs, "past_key_values", None)
        cached = cached and memory is not None  # a family without a cache: read the window anew each time
        logits = _logits(outputs)[0, -1].float().cpu()
        token = choose(logits[: getattr(model, "real_vocab_size", None)], **draw)
        yield token
        fresh = [token]
        window.append(token)


@contextmanager
def _asleep(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no compilation (each length would compile anew); all undone
    afterwards.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, training in modes:
            module.training = training


def choose(
    logits: Tensor, *, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> int:
    """One token id from logits (V,) on the CPU.

    Raises:
        RequestError: no finite logit.
    """
    if not bool(torch.isfinite(logits.max())):
        raise RequestError(
            "the model's logits are not finite: the weights are broken; take another checkpoint"
        )
    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        kept, order = logits.topk(min(top_k, logits.numel()))
    else:
        kept, order = logits.sort(descending=True)
    probabilities = torch.softmax(kept / temperature, 0)
    if top_p < 1:
        before = probabilities.cumsum(0) - probabilities
        probabilities[before >= top_p] = 0  # the first one always stays
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def _logits(outputs: Any) -> Tensor:
    logits = outputs.get("logits") if isinstance(outputs, dict) else getattr(outputs, "logits", None)
    if logits is None:
        logits = outputs if isinstance(outputs, Tensor) else outputs[0]
    if logits.ndim != 3:
        raise RequestError(
            f"the model returned {tuple(logits.shape)}, not logits (blocks, tokens, vocabulary)"
        )
    return logits
