"""Linear layers by oneDNN: the numbers and gradients of torch's own, in every form that a layer takes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import lmcore.model.products as products
from lmcore.model.build import build_model
from lmcore.model.loss import causal_lm_loss
from lmcore.model.module import HeadForm, ModelWithLoss

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN, as on a Mac"
)

# Sums of K products of normal numbers in float32: K**0.5 times the rounding of one (6e-8) times their size (K**0.5 at most
# 28 here), and a factor of 4 for the order of the sum.
TOLERANCE = 2e-4


@pytest.fixture
def amd(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Any CPU counts as one where oneDNN is faster; the calls of it are counted."""
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr("lmcore.model.loss.onednn_is_faster", lambda: True)
    calls: list[tuple[int, ...]] = []
    onednn = products._onednn

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        calls.append((*x.shape, weight.shape[0]))
        return onednn(x, weight, bias)

    monkeypatch.setattr(products, "_onednn", counted)
    return calls


def gradients(x: Tensor, weight: Tensor, bias: Tensor | None, inputs_first: bool, by: Any) -> list[Tensor]:
    """Output and gradients, for a gradient that is another number for every output."""
    inputs = [t.detach().clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    one_bias = inputs[2] if bias is not None else None
    y = by(inputs[0], inputs[1], one_bias, inputs_first)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    return [y.detach(), *(t.grad for t in inputs if t.grad is not None)]


def by_torch(x: Tensor, weight: Tensor, bias: Tensor | None, inputs_first: bool) -> Tensor:
    return F.linear(x, weight.t() if inputs_first else weight, bias)


def by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None, inputs_first: bool) -> Tensor:
    return products.linear(x, weight, bias, inputs_first=inputs_first)


@pytest.mark.parametrize("inputs_first", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", [(768, 128), (4, 192, 128), (2, 3, 128, 96)], ids=str)
@pytest.mark.parametrize("outputs", [64, 512, 1000])
def test_numbers_and_gradients_are_those_of_float64(
    amd: list[Any], shape: tuple[int, ...], outputs: int, with_bias: bool, inputs_first: bool
) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    weight = torch.randn((shape[-1], outputs) if inputs_first else (outputs, shape[-1]))
    bias = torch.randn(outputs) if with_bias else None
    made = gradients(x, weight, bias, inputs_first, by_onednn)
    wide = gradients(
        x.double(), weight.double(), None if bias is None else bias.double(), inputs_first, by_torch
    )
    assert len(amd) == 3
    for name, one, other in zip(("output", "x", "weight", "bias"), made, wide, strict=False):
        assert one.shape == other.shape, name
        assert one.is_contiguous(), name
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=TOLERANCE, msg=name)


def test_views_of_every_kind_give_the_same(amd: list[Any]) -> None:
    """Transposed and sliced inputs, and the gradient of a sum, whose elements are one number in memory."""
    torch.manual_seed(0)
    whole = torch.randn(128, 300, 2)
    weight = torch.randn(256, 128, requires_grad=True)
    for x in (whole[..., 0].t(), whole[:, :, 1].t()[:256], torch.randn(128).expand(400, 128)):
        x = x.detach().requires_grad_()
        for target in (x, weight):
            target.grad = None
        products.linear(x, weight).sum().backward()
        made = x.grad, weight.grad
        x.grad = weight.grad = None
        F.linear(x, weight).sum().backward()
        for one, other in zip(made, (x.grad, weight.grad)):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=TOLERANCE)
    assert len(amd) == 9


def test_only_what_needs_a_gradient_is_computed(amd: list[Any]) -> None:
    x, weight = torch.randn(768, 128), torch.randn(512, 128)
    with torch.no_grad():
        products.linear(x, weight)
    assert len(amd) == 1
    products.linear(x, weight.requires_grad_()).sum().backward()  # an embedding that is frozen
    assert len(amd) == 3
    frozen = nn.Linear(128, 512).requires_grad_(False)
    products.linear(x.requires_grad_(), frozen.weight, frozen.bias).sum().backward()
    assert len(amd) == 5
    assert frozen.weight.grad is None


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.randn(16, 128), torch.randn(512, 128)),
        (torch.randn(768, 128).double(), torch.randn(512, 128).double()),
        (torch.randn(768, 128).bfloat16(), torch.randn(512, 128).bfloat16()),
        (torch.randn(2048), torch.randn(2048, 2048)),
    ],
    ids=["few", "float64", "bfloat16", "vector"],
)
def test_anything_else_is_torch_s_own(amd: list[Any], x: Tensor, weight: Tensor) -> None:
    assert torch.equal(products.linear(x, weight), F.linear(x, weight))
    assert not amd


def test_autocast_and_compiled_code_keep_torch_s_own(amd: list[Any]) -> None:
    x, weight = torch.randn(768, 128), torch.randn(512, 128)
    with torch.autocast("cpu", torch.bfloat16):
        assert products.linear(x, weight).dtype == torch.bfloat16
    compiled = torch.compile(lambda a, b: products.linear(a, b), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, weight), F.linear(x, weight))
    assert not amd


def test_recomputed_layers_have_the_same_gradients(amd: list[Any]) -> None:
    layer = nn.Linear(128, 512)
    x = torch.randn(768, 128, requires_grad=True)

    def forward(a: Tensor) -> Tensor:
        return products.linear(a, layer.weight, layer.bias).relu()

    forward(x).square().sum().backward()
    kept = x.grad.clone(), layer.weight.grad.clone()
    x.grad = layer.weight.grad = None
    checkpoint(forward, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(kept[0], x.grad)
    assert torch.equal(kept[1], layer.weight.grad)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_model_has_the_loss_and_gradients_of_before(
    monkeypatch: pytest.MonkeyPatch, amd: list[Any], kind: str
) -> None:
    """All layers and the head, among them tied ones, against the same model without; and a copy of it."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 128}
    ids = torch.randint(0, 512, (4, 65), generator=torch.Generator().manual_seed(0))

    def made(faster: bool) -> tuple[ModelWithLoss, float, dict[str, Tensor]]:
        with monkeypatch.context() as patch:
            if not faster:
                patch.setattr(products, "onednn_is_faster", lambda: False)
                patch.setattr("lmcore.model.loss.onednn_is_faster", lambda: False)
            model = build_model(type=kind, config_overrides=sizes, vocab_size=512, block_size=64, seed=0)
            module = ModelWithLoss(model).eval()  # without dropout
            total, count = module(input_ids=ids[:, :-1], labels=ids[:, 1:])
            (total / count).backward()
        return module, total.item(), {n: p.grad for n, p in module.named_parameters()}

    _, plain_loss, plain = made(False)
    assert not amd
    module, loss, grads = made(True)
    layers = sum(type(m) in (nn.Linear, Conv1D) for m in module.modules())
    assert (
        len(amd) >= 3 * layers - 1
    )  # nobody asks for the gradient of the first one's input in no family here
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    for name, gradient in plain.items():
        torch.testing.assert_close(grads[name], gradient, rtol=1e-4, atol=1e-7, msg=name)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        next(p for p in twin.parameters() if p.ndim == 2).mul_(2)
        again = module(input_ids=ids[:, :-1], labels=ids[:, 1:])[0].item()
        other = twin(input_ids=ids[:, :-1], labels=ids[:, 1:])[0].item()
    assert again == loss != other  # the copy's layers use the copy's weights


def test_the_form_of_a_large_head_is_recognized(amd: list[Any]) -> None:
    """Its probe of four tokens is large enough for oneDNN, whose rounding is another than that of torch's own product."""
    fields = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 256, "intermediate_size": 64}
    model = build_model(
        type="nanochat", config_overrides=fields, vocab_size=8000, block_size=16, seed=0, zero_init=True
    )
    module = ModelWithLoss(model)
    assert module.head_path == "chunked"
    assert module.head_form == HeadForm(softcap=15.0)
    assert amd


@pytest.mark.parametrize("chunk", [256, 100])
def test_the_head_in_chunks(amd: list[Any], chunk: int) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(256, 128), torch.randn(1000, 128) / 11
    labels = torch.randint(0, 1000, (256,))
    labels[3] = -100
    results = []
    for dtype in (torch.float32, torch.float64):
        h, w = (t.to(dtype).detach().clone().requires_grad_() for t in (hidden, weight))
        total, count = causal_lm_loss(h, w, None, labels, chunk=chunk)
        (total / count).backward()
        results.append((total, h.grad, w.grad))
    assert len(amd) == 3 * -(-256 // chunk)
    for one, other in zip(*results):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)


def test_the_vendor_and_the_instructions_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only an AMD CPU with AVX-512; and a model is left as it is on any other."""
    decide = products.onednn_is_faster.__wrapped__
    for amd, capability, faster in ((True, "AVX512", True), (True, "AVX2", False), (False, "AVX512", False)):
        monkeypatch.setattr(products, "_is_amd", lambda amd=amd: amd)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=capability: name)
        assert decide() is (faster and torch.backends.mkl.is_available())
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    layer = nn.Linear(128, 128)
    products.use_faster_products(layer)
    assert "forward" not in vars(layer)


def test_the_vendor_is_read_where_the_system_keeps_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(products, "Path", lambda name: info)
    monkeypatch.setattr(products.platform, "processor", lambda: "AMD64 Family 25 Model 97, AuthenticAMD")
    assert products._is_amd()  # no such file: Windows
    info.write_text("vendor_id\t: GenuineIntel\n")
    assert not products._is_amd()
    info.write_text("vendor_id\t: AuthenticAMD\n")
    assert products._is_amd()
