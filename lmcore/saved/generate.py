"""Generating text from any module that returns logits.

The same seed gives the same text on any device with the same logits. Incomplete characters are never shown (a piece of a
byte-fallback tokenizer may be one byte of three), ids that only pad the vocabulary are never sampled, and the model's
training mode is restored.

Example::

    saved = load_model("runs/demo")
    for piece in stream(saved.model, saved.tokenizer, "def ", 100, temperature=0.8, top_p=0.95, seed=1):
        print(piece, end="", flush=True)

Letters in shapes: T tokens so far, V vocabulary.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmcore.errors import RequestError
from lmcore.model.config import context_length
from lmcore.model.module import ModelWithLoss
from lmcore.saved.weights import device_of

_HALF_CHARACTER = "\N{REPLACEMENT CHARACTER}"
_MOST_HELD_TOKENS = 8
"""A UTF-8 character has at most 4 bytes; text that is still incomplete after this many tokens is shown as it is."""


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    max_tokens: int = 200,
    *,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop_at_eos: bool = True,
    forward: Callable[..., Any] | None = None,
    agree: Callable[[Callable[[], int]], int] = lambda choice: choice(),
) -> list[str]:
    """The continuation of each prompt. Arguments and errors are those of :func:`stream`.

    A prompt's continuation does not depend on the other prompts.

    Example::

        saved = load_model("runs/demo")
        texts = generate(saved.model, saved.tokenizer, ["def ", "class "], 50, temperature=0)
    """
    settings: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop_at_eos": stop_at_eos,
        "forward": forward,
        "agree": agree,
    }
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
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop_at_eos: bool = True,
    forward: Callable[..., Any] | None = None,
    agree: Callable[[Callable[[], int]], int] = lambda choice: choice(),
) -> Iterator[str]:
    """Continue ``prompt`` and yield the new text as it comes.

    Args:
        model: a transformers model, a :class:`~lmcore.model.module.ModelWithLoss`, or any module that takes
            ``input_ids`` (1, T) and returns logits (1, T, V), alone or as ``.logits`` or first field.
        tokenizer: :class:`lmcore.data.tokenizer.tokenizer.Tokenizer`.
        prompt: empty for the start of a document.
        max_tokens: largest number of tokens in the continuation.
        temperature: 0 is greedy: always the most probable token.
        top_k: sample from the k most probable tokens; 0: from all.
        top_p: sample from the smallest set of tokens with at least this probability (Holtzman et al. 2019,
            arXiv:1904.09751); 1: from all.
        repetition_penalty: positive logits of tokens in the window are divided by it, negative ones multiplied
            (Keskar et al. 2019, arXiv:1909.05858); 1: none.
        seed: seed for sampling. It is combined with the prompt, so that a continuation does not depend on other prompts.
        stop_at_eos: stop at the end of the document.
        forward: called instead of ``model`` if several ranks share its weights.
        agree: called with a function that chooses the next token; returns the token. If ranks compute together, it must
            return the same on all of them, so that they stop together.

    Raises:
        RequestError: immediately for a setting out of range or a prompt that is not valid Unicode; later for logits that
            are not finite.
    """
    if tokenizer is None:
        raise RequestError("this model has no tokenizer: generate tokens with the model itself")
    draw = Draw(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        generator=torch.Generator(),
    )
    if max_tokens < 0:
        raise RequestError(f"max_tokens must be 0 or more (got {max_tokens})")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the prompt is not valid Unicode at character {error.start + 1}: bytes that are not UTF-8 must be "
            "replaced before they get here"
        ) from None
    digest = hashlib.sha256(f"lmcore generate {seed} {prompt}".encode()).digest()
    draw.generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    tokens = functools.partial(_tokens, model, tokenizer.vocab_size, max_tokens, draw, forward, agree)
    return _continued(tokens, tokenizer, prompt, stop_at_eos=stop_at_eos)


@dataclass(frozen=True, kw_only=True)
class Draw:
    """How the next token is chosen from logits. The arguments are those of :func:`stream`.

    Raises:
        RequestError: a setting out of range.
    """

    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float = 1.0
    generator: torch.Generator

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise RequestError(f"temperature must be 0 or more (got {self.temperature}); 0 is greedy")
        if self.top_k < 0:
            raise RequestError(f"top_k must be 0 or more (got {self.top_k}); 0 draws from all tokens")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p must be above 0 and at most 1 (got {self.top_p})")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise RequestError(
                f"repetition_penalty must be above 0 (got {self.repetition_penalty}); 1 is none, 1.1 to 1.3 are usual"
            )


def _continued(
    tokens: Callable[[Sequence[int]], Iterator[int]], tokenizer: Any, prompt: str, *, stop_at_eos: bool
) -> Iterator[str]:
    ids = list(tokenizer.encode(prompt)) or [tokenizer.eos_id]  # every document begins after an EOS
    start = len(ids)
    shown = start  # ids before this index have been shown
    # Decoding starts here: a piece may depend on its neighbours, but not on distant ones.
    anchor = max(0, start - 4)
    for token in tokens(ids):
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


def _kept(context: int | None, tokens: int) -> int:
    """How many of the last ``tokens`` the model sees: all that fit, otherwise half of the context, so that the next ones fit."""
    return tokens if context is None or tokens <= context else context // 2 + 1


def tokens_seen(model: nn.Module, tokenizer: Any, prompt: str) -> tuple[int, int]:
    """How many tokens of the prompt the model sees when it chooses the first token, and how many there are."""
    tokens = len(tokenizer.encode(prompt)) if tokenizer is not None else 0
    return _kept(context_length(model), tokens), tokens


def _tokens(
    model: nn.Module,
    vocab_size: int,
    max_tokens: int,
    draw: Draw,
    forward: Callable[..., Any] | None,
    agree: Callable[[Callable[[], int]], int],
    prompt: Sequence[int],
) -> Iterator[int]:
    """Yield token after token, chosen by :func:`choose`. When the model's context is full, the older half is dropped."""
    if isinstance(model, ModelWithLoss):
        model = model.model
    device = device_of(model)
    context = context_length(model)
    cached = hasattr(model, "prepare_inputs_for_generation")  # transformers models keep keys and values
    window = list(prompt)
    fresh = window
    memory: Any = None
    for _ in range(max_tokens):
        if len(window) > _kept(context, len(window)):
            window = window[-_kept(context, len(window)) :]
            fresh, memory = window, None
        if not cached:
            fresh = window
        with _inference_mode(model):
            inputs = {"input_ids": torch.tensor([fresh], device=device)}
            if cached:
                inputs |= {"use_cache": True, "past_key_values": memory}  # type: ignore[dict-item] # not tensors
            try:
                outputs = (forward or model)(**inputs)
            except ValueError:
                if not cached or memory is not None:
                    raise
                # A family may not support a cache, such as one with only linear attention: try again without it. If the cache
                # was not the problem, this raises again.
                cached = False
                outputs = (forward or model)(input_ids=inputs["input_ids"])
        memory = getattr(outputs, "past_key_values", None)
        cached = cached and memory is not None  # a family without a cache: the whole window each time
        logits = _logits(outputs)[0, -1].float().cpu()
        # Pretrained weights may have more ids than their tokenizer.
        logits = logits[: getattr(model, "real_vocab_size", None)][:vocab_size]
        token = agree(functools.partial(choose, logits, draw, window))
        yield token
        fresh = [token]
        window.append(token)


@contextmanager
def _inference_mode(model: nn.Module) -> Iterator[None]:
    """Context with evaluation mode, and without gradients and compilation (every new length would compile again)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, training in modes:
            module.training = training


def choose(logits: Tensor, draw: Draw, window: Sequence[int] = ()) -> int:
    """One token id from logits (V,) on the CPU.

    Args:
        window: ids that the repetition penalty applies to.

    Raises:
        RequestError: there is no finite logit.
    """
    if not bool(torch.isfinite(logits.max())):
        raise RequestError(
            "the model's logits are not finite: its weights are broken; use another checkpoint"
        )
    if draw.repetition_penalty != 1:
        seen = torch.tensor(sorted({token for token in window if token < len(logits)}), dtype=torch.long)
        values, penalty, most = logits[seen].double(), draw.repetition_penalty, torch.finfo(logits.dtype).max
        # In float32 a penalty near 0 would be 0, and a large one infinite.
        values = torch.where(values > 0, values / penalty, values * penalty).clamp(-most, most)
        logits = logits.index_copy(0, seen, values.to(logits.dtype))
    if draw.temperature == 0:
        return int(logits.argmax())
    if draw.top_k:
        kept, order = logits.topk(min(draw.top_k, logits.numel()))
    else:
        kept, order = logits.sort(descending=True)
    scaled = kept / draw.temperature
    # With a tiny temperature this overflows; relative to the largest logit it does not.
    if not bool(torch.isfinite(scaled[0])):
        scaled = ((kept - kept[0]).double() / draw.temperature).float()
    probabilities = torch.softmax(scaled, 0)
    if draw.top_p < 1:
        before = probabilities.cumsum(0) - probabilities
        probabilities[before >= draw.top_p] = 0  # the most probable token always stays
    return int(order[torch.multinomial(probabilities, 1, generator=draw.generator)])


def _logits(outputs: Any) -> Tensor:
    logits = outputs.get("logits") if isinstance(outputs, dict) else getattr(outputs, "logits", None)
    if logits is None:
        logits = outputs if isinstance(outputs, Tensor) else outputs[0]
    if logits.ndim != 3:
        raise RequestError(
            f"the model returned {tuple(logits.shape)}, not logits (blocks, tokens, vocabulary)"
        )
    return logits
