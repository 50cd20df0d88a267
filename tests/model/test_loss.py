"""Loss: the chunked head against the slow obvious one, and the obvious one against torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmcore.errors import RequestError
from lmcore.model import loss as loss_module
from lmcore.model.loss import (
    CHUNK_BYTES,
    IGNORED_LABEL,
    Gpu,
    causal_lm_loss,
    choose_chunk,
    count_labels,
    cross_entropy_sum,
    rows_of_whole_waves,
    token_losses,
)


def make(n: int, width: int, padded: int, real: int, *, dtype: torch.dtype, bias: bool, seed: int = 0) -> Any:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, width, generator=g, dtype=dtype, requires_grad=True)
    weight = torch.randn(padded, width, generator=g, dtype=dtype, requires_grad=True)
    b = torch.randn(padded, generator=g, dtype=dtype, requires_grad=True) if bias else None
    labels = torch.randint(0, real, (n,), generator=g)
    labels[::5] = IGNORED_LABEL
    return hidden, weight, b, labels


def gradients(loss: Tensor, inputs: list[Tensor], factor: float) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss * factor, inputs)


def test_reference_is_torchs_cross_entropy() -> None:
    logits = torch.randn(40, 17, dtype=torch.float64)
    labels = torch.randint(0, 17, (40,))
    labels[3] = IGNORED_LABEL
    for smoothing in (0.0, 0.1):
        ours = token_losses(logits, labels, label_smoothing=smoothing)
        torchs = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-12)
    lse = torch.logsumexp(logits, -1)
    expected = torch.where(labels >= 0, 0.01 * lse**2, 0.0)
    torch.testing.assert_close(
        token_losses(logits, labels, z_loss=0.01) - token_losses(logits, labels), expected
    )


def test_ignored_labels_equal_ignore_index_pad() -> None:
    pad = 3
    logits = torch.randn(30, 11)
    labels = torch.randint(4, 11, (30,))
    labels[20:] = pad
    by_position = torch.where(torch.arange(30) >= 20, IGNORED_LABEL, labels)
    expected = torch.nn.CrossEntropyLoss(ignore_index=pad)(logits, labels)
    loss_sum, count = cross_entropy_sum(logits, by_position)
    torch.testing.assert_close(loss_sum / count, expected)


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.125, None), (1.0, 3.0), (0.5, 15.0)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.2, 1e-3)])
@pytest.mark.parametrize(("chunk", "compiled"), [(1, False), (8, False), (64, False), (16, True)])
def test_chunked_equals_plain(
    bias: bool,
    smoothing: float,
    z_loss: float,
    scale: float,
    softcap: float | None,
    chunk: int,
    compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What the compiler gets is run as it is: whether inductor fuses it rightly is not a matter of formulas.
    monkeypatch.setattr(loss_module, "_compiled_tile", lambda: loss_module._tile_to_compile)
    if compiled:  # as on a GPU: a CPU never compiles it
        monkeypatch.setattr(loss_module, "whole_chunks", lambda device_type: True)
    # float64: any difference beyond rounding would be an error in a formula.
    hidden, weight, b, labels = make(37, 16, 64, 29, dtype=torch.float64, bias=bias)
    inputs = [t for t in (hidden, weight, b) if t is not None]
    options: Any = {"label_smoothing": smoothing, "z_loss": z_loss, "vocab_size": 29}
    options |= {"scale": scale, "softcap": softcap}
    plain, count = causal_lm_loss(hidden, weight, b, labels, chunk=0, **options)
    chunked, same_count = causal_lm_loss(hidden, weight, b, labels, chunk=chunk, compiled=compiled, **options)
    assert count == same_count == int((labels != IGNORED_LABEL).sum())
    torch.testing.assert_close(chunked, plain, rtol=1e-13, atol=1e-12)
    for ours, theirs in zip(gradients(chunked, inputs, 0.3), gradients(plain, inputs, 0.3)):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_softmax_is_not_compiled_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "_compiled_tile", lambda: pytest.fail("compiled"))
    hidden, weight, _, labels = make(37, 16, 64, 29, dtype=torch.float32, bias=False)
    one, _ = causal_lm_loss(hidden, weight, None, labels, chunk=16, compiled=True)
    other, _ = causal_lm_loss(hidden, weight, None, labels, chunk=16)
    assert torch.equal(one, other)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    real=st.integers(2, 30),
    padding=st.integers(0, 5),
    chunk=st.integers(1, 50),
    ignored=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_chunked_equals_plain_for_any_shape(
    n: int, real: int, padding: int, chunk: int, ignored: float, seed: int
) -> None:
    hidden, weight, _, labels = make(n, 5, real + padding, real, dtype=torch.float64, bias=False, seed=seed)
    labels[torch.rand(n, generator=torch.Generator().manual_seed(seed)) < ignored] = IGNORED_LABEL
    plain, _ = causal_lm_loss(hidden, weight, None, labels, chunk=0, vocab_size=real)
    chunked, count = causal_lm_loss(hidden, weight, None, labels, chunk=chunk, vocab_size=real)
    assert int(count) == int((labels != IGNORED_LABEL).sum())
    torch.testing.assert_close(chunked, plain, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients(chunked, [hidden, weight], 1), gradients(plain, [hidden, weight], 1)):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


class _Recomputed(torch.autograd.Function):
    """Runs the forward anew in each backward: gradcheck asks for several, the chunked head gives one."""

    @staticmethod
    def forward(ctx: Any, function: Any, *inputs: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        inputs = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            return None, *torch.autograd.grad(ctx.function(*inputs) * grad, inputs)


def test_gradcheck_in_float64() -> None:
    hidden, weight, b, labels = make(7, 4, 8, 6, dtype=torch.float64, bias=True)

    def loss(h: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        options: Any = {"label_smoothing": 0.1, "z_loss": 1e-2, "vocab_size": 6, "scale": 0.7, "softcap": 2.0}
        return causal_lm_loss(h, w, bias, labels, chunk=3, **options)[0]

    assert torch.autograd.gradcheck(lambda *inputs: _Recomputed.apply(loss, *inputs), (hidden, weight, b))


def test_vocabulary_padding_does_not_change_the_loss() -> None:
    hidden, weight, _, labels = make(20, 8, 64, 50, dtype=torch.float64, bias=False)
    small = weight.detach()[:50].clone().requires_grad_()
    for chunk in (0, 6):
        padded, _ = causal_lm_loss(hidden, weight, None, labels, chunk=chunk, vocab_size=50)
        cut, _ = causal_lm_loss(hidden, small, None, labels, chunk=chunk)
        torch.testing.assert_close(padded, cut, rtol=1e-13, atol=1e-12)
        (gradient,) = torch.autograd.grad(padded, weight)
        assert gradient[50:].eq(0).all()
        torch.testing.assert_close(gradient[:50], torch.autograd.grad(cut, small)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 15.0])
@pytest.mark.parametrize("chunk", [0, 16])
def test_bfloat16_autocast_is_as_exact_chunked_as_plain(chunk: int, softcap: float | None) -> None:
    hidden, weight, _, labels = make(128, 32, 256, 250, dtype=torch.float32, bias=False)
    options: Any = {"vocab_size": 250, "softcap": softcap}
    truth, _ = causal_lm_loss(hidden.double(), weight.double(), None, labels, chunk=0, **options)
    true_gradients = gradients(truth, [hidden, weight], 1 / 128)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = causal_lm_loss(hidden, weight, None, labels, chunk=chunk, **options)
    # Torch 2.13's own chunked loss accumulates in bfloat16 and is off by 2 %
    assert loss.dtype == torch.float32
    # Inputs rounded to 8 bits: logits of size |h||w| ~ 6 move by up to 2**-8 relative, the sum much less.
    torch.testing.assert_close(loss, truth.float(), rtol=2e-3, atol=0)
    for ours, theirs in zip(gradients(loss, [hidden, weight], 1 / 128), true_gradients):
        assert ours.dtype == torch.float32
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-2


def test_float16_keeps_the_gradients_of_rare_tokens() -> None:
    g = torch.Generator().manual_seed(0)
    hidden = (0.1 * torch.randn(32, 16, generator=g)).half().requires_grad_()
    weight = torch.randn(30_000, 16, generator=g).half().requires_grad_()  # p near 3e-5 all over
    labels = torch.randint(0, 64, (32,), generator=g)
    loss, _ = causal_lm_loss(hidden, weight, None, labels, chunk=8)
    truth, _ = causal_lm_loss(hidden.double(), weight.double(), None, labels, chunk=0)
    for ours, theirs in zip(gradients(loss, [hidden, weight], 1.0), gradients(truth, [hidden, weight], 1.0)):
        assert float((ours - theirs).norm() / theirs.norm()) < 2e-3  # float16 has 11 bits


def test_tied_weights_add_both_gradients() -> None:
    def run(chunk: int) -> Tensor:
        embedding = torch.nn.Embedding(
            32, 8, _weight=torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
        )
        ids = torch.arange(20) % 32
        loss, _ = causal_lm_loss(embedding(ids), embedding.weight, None, (ids + 1) % 32, chunk=chunk)
        loss.backward()
        assert embedding.weight.grad is not None
        return embedding.weight.grad

    torch.testing.assert_close(run(7), run(0), rtol=1e-5, atol=1e-5)


def test_frozen_weights_and_no_grad_get_no_gradient() -> None:
    hidden, weight, _, labels = make(20, 8, 32, 32, dtype=torch.float32, bias=False)
    loss, _ = causal_lm_loss(hidden, weight.detach(), None, labels, chunk=6)
    assert torch.autograd.grad(loss, hidden)[0].shape == hidden.shape
    loss, _ = causal_lm_loss(hidden.detach(), weight, None, labels, chunk=6)
    assert torch.autograd.grad(loss, weight)[0].shape == weight.shape
    with torch.no_grad():
        loss, _ = causal_lm_loss(hidden, weight, None, labels, chunk=6)
    assert not loss.requires_grad


def test_bias_of_the_head_is_trained_alone_too() -> None:
    hidden, weight, b, labels = make(20, 8, 32, 32, dtype=torch.float64, bias=True)
    hidden, weight = hidden.detach(), weight.detach()
    gradients = [
        torch.autograd.grad(causal_lm_loss(hidden, weight, b, labels, chunk=chunk)[0], b)[0]
        for chunk in (0, 6)
    ]
    torch.testing.assert_close(gradients[1], gradients[0])


def test_only_ignored_labels_give_zero_and_not_nan() -> None:
    hidden, weight, _, labels = make(9, 4, 16, 16, dtype=torch.float32, bias=False)
    labels.fill_(IGNORED_LABEL)
    for chunk in (0, 4):
        loss, count = causal_lm_loss(hidden, weight, None, labels, chunk=chunk, z_loss=1e-3)
        assert loss == 0
        assert count == 0
        for gradient in torch.autograd.grad(loss, [hidden, weight]):
            assert gradient.eq(0).all()


def test_second_backward_is_refused() -> None:
    hidden, weight, _, labels = make(9, 4, 16, 16, dtype=torch.float32, bias=False)
    loss, _ = causal_lm_loss(hidden, weight, None, labels, chunk=4)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once per forward"):
        loss.backward()


@pytest.mark.parametrize("softcap", [None, 15.0])
def test_peak_memory_of_the_head_is_bounded_by_the_chunk(softcap: float | None) -> None:
    hidden, weight, _, labels = make(2048, 16, 4096, 4096, dtype=torch.float32, bias=False)

    def peak(chunk: int) -> int:
        with torch.profiler.profile(
            profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
        ) as p:
            loss, _ = causal_lm_loss(hidden, weight, None, labels, chunk=chunk, softcap=softcap)
            torch.autograd.grad(loss, [hidden, weight])
        now = highest = 0
        for event in p.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                highest = max(highest, now)
        return highest

    assert peak(128) < 0.25 * peak(0)


def test_choose_chunk() -> None:
    assert choose_chunk(0, tokens=4096, vocab_size=50304) == 0
    assert choose_chunk(300, tokens=4096, vocab_size=50304) == 300
    assert choose_chunk(300, tokens=100, vocab_size=50304) == 100
    auto = choose_chunk("auto", tokens=10**7, vocab_size=8192)
    assert 0.99 * CHUNK_BYTES < auto * 8192 * 2 <= CHUNK_BYTES
    assert choose_chunk("auto", tokens=4096, vocab_size=50304) == 1024  # equal chunks, no small remainder
    assert choose_chunk("auto", tokens=1000, vocab_size=8192) == 1000
    assert choose_chunk("auto", tokens=10**5, vocab_size=10**7) == 64
    with pytest.raises(RequestError, match=r"loss\.chunk"):
        choose_chunk(-1, tokens=1, vocab_size=1)


@pytest.mark.parametrize(
    ("tokens", "vocab", "width", "gpu", "rows"),
    [
        # H200, 141 GB: 2.2 GB of logits are 21,898 rows. GPT-2 124M: 22 tiles of 256 rows a wave of 132 / 6 tiles, 3 waves.
        (65_536, 50_304, 768, Gpu(132, 141 * 10**9), 3 * 22 * 256),
        (65_536, 50_304, 1_600, Gpu(132, 141 * 10**9), 256 * (8 * 132 // 13)),  # 1.5B: 13 tiles wide
        (65_536, 50_304, 768, Gpu(132, 80 * 10**9), 2 * 22 * 256),  # H100, 80 GB
        (65_536, 50_304, 768, Gpu(108, 40 * 10**9), 2 * 18 * 256),  # A100: the 1 GiB that every GPU may take
        (16_384, 128_256, 2_048, Gpu(132, 141 * 10**9), 256 * (4 * 132 // 16)),  # Llama 1B
        (16_384, 128_256, 2_048, Gpu(128, 24 * 10**9), 2 * 8 * 256),  # 4,185 rows: 2 waves of 8 x 16 tiles
        (16_384, 10**6, 768, Gpu(132, 24 * 10**9), 2 * 256),  # 536 rows, less than one wave: whole tiles
        (16_384, 10**8, 768, Gpu(132, 24 * 10**9), 256),  # a wave has no less than one row of tiles
        (4_096, 50_304, 768, Gpu(132, 80 * 10**9), 4_096),  # one chunk
    ],
)
def test_chunk_on_a_gpu_fills_whole_waves(tokens: int, vocab: int, width: int, gpu: Gpu, rows: int) -> None:
    on_gpu = {"device_type": "cuda", "gpu": gpu, "width": width}
    assert choose_chunk("auto", tokens=tokens, vocab_size=vocab, **on_gpu) == rows
    assert choose_chunk(300, tokens=tokens, vocab_size=vocab, **on_gpu) == 300


@given(st.integers(1, 100_000), st.integers(1, 20_000), st.integers(1, 200))
def test_rows_of_whole_waves_are_the_most_that_leave_no_room_for_another_row_of_tiles(
    most: int, width: int, multiprocessors: int
) -> None:
    rows = rows_of_whole_waves(most, width=width, multiprocessors=multiprocessors)
    high, wide = rows // 256, -(-width // 128)
    assert rows % 256 == 0
    assert rows <= max(256, most)

    def waves(tile_rows: int) -> int:
        return -(-tile_rows * wide // multiprocessors)

    fuller = [n for n in range(1, most // 256 + 1) if waves(n + 1) > waves(n)]
    assert high == (fuller[-1] if fuller else max(1, most // 256))


def test_wrong_shapes_and_labels_are_refused_with_the_remedy() -> None:
    with pytest.raises(RequestError, match=r"loss\.factory"):
        cross_entropy_sum(torch.randn(4, 3), torch.randn(4))
    with pytest.raises(RequestError, match=r"\(4, 3\) do not fit labels \(5,\)"):
        cross_entropy_sum(torch.randn(4, 3), torch.zeros(5, dtype=torch.int64))


def test_labels_of_any_shape() -> None:
    logits = torch.randn(2, 3, 4, 5)
    labels = torch.randint(0, 5, (2, 3, 4))
    loss_sum, count = cross_entropy_sum(logits, labels)
    torch.testing.assert_close(loss_sum / count, F.cross_entropy(logits.reshape(-1, 5), labels.reshape(-1)))
    assert int(count_labels(labels)) == 24
