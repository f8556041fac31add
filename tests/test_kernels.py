"""The kernels give what the textbook's lines give, forward and backward, whatever the processor."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wejepa import kernels
from wejepa.config import default_config
from wejepa.kernels import Linear, linear
from wejepa.model import IJEPA_base

PROCESSORS = {
    "default": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}


def compare(fast, plain, *tensors):
    """Result and gradients of both functions, in float32 against float64."""
    given = [t.clone().requires_grad_() for t in tensors]
    exact = [t.double().requires_grad_() for t in tensors]
    found, wanted = fast(*given), plain(*exact)
    towards = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad(found, given, towards.float())
    for got, right in zip([found, *gradients], [wanted, *torch.autograd.grad(wanted, exact, towards)], strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=2e-6 * right.abs().max().item())


@pytest.mark.parametrize(("shape", "wide"), [((3, 5), 7), ((4, 21, 64), 192), ((4, 21, 256), 64), ((2, 3, 4, 8), 8), ((1, 6), 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_a_product_and_a_bias(shape, wide, bias):
    torch.manual_seed(0)
    tensors = [torch.randn(shape), torch.randn(wide, shape[-1]), *([torch.randn(wide)] if bias else [])]
    compare(linear, lambda x, w, b=0: x @ w.T + b, *tensors)


def test_linear_takes_what_is_not_contiguous():
    torch.manual_seed(0)
    compare(
        lambda x, w: linear(x.transpose(0, 1)[:, ::2], w),
        lambda x, w: x.transpose(0, 1)[:, ::2] @ w.T,
        torch.randn(6, 4, 8),
        torch.randn(5, 8),
    )


def test_linear_gives_only_the_gradients_that_are_asked_for():
    x, layer = torch.randn(4, 6), Linear(6, 3).requires_grad_(False)
    assert not layer(x).requires_grad
    layer.bias.requires_grad_(True)
    layer(x).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad.eq(4).all()


def test_linear_follows_autocast_and_types():
    x, layer = torch.randn(4, 6), Linear(6, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer.double()(x.double()).dtype == torch.float64
    with torch.device("meta"):
        assert Linear(6, 3)(torch.randn(4, 6)).shape == (4, 3)


def test_where_onednn_is_missing_the_numbers_stay(monkeypatch):
    torch.manual_seed(0)
    model, images = IJEPA_base(default_config()), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        fast = model.encode(images)
        monkeypatch.setattr(kernels, "ONEDNN", False)
        torch.testing.assert_close(model.encode(images), fast, rtol=1e-4, atol=1e-5)


def test_every_layer_of_a_transformer_is_computed_so():
    model = IJEPA_base(default_config())
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {Linear}
    x = torch.randn(4, 64)
    layer = model.predictor.embed
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("processor", PROCESSORS)
def test_other_processors(processor):
    """The tests above with the instructions that such a processor has."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "not other_processors"]
    done = subprocess.run(command, env=os.environ | PROCESSORS[processor], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
