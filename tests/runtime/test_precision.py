"""Weights in few bits: what they come back as, and what they leave alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from step1x_edit.model.config import tiny_transformer
from step1x_edit.model.transformer import Step1XEditTransformer2DModel
from step1x_edit.runtime.precision import StoredLinear, store, widen

from .loading import store_linears

BOUNDS = {"fp8": 0.04, "int8": 0.01, "int4": 0.12}
"""‖stored - weight‖ / ‖weight‖ of normally distributed weights."""


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("in_features", [96, 40])
@pytest.mark.parametrize("size", [1e-4, 0.02, 300.0])
def test_weights_of_any_size_come_back(precision, in_features, size):
    weight = torch.randn(64, in_features, generator=torch.Generator().manual_seed(0)) * size
    found = widen(store(weight, precision), precision, torch.float32, in_features)
    assert found.shape == weight.shape
    assert relative_error(found, weight) <= BOUNDS[precision]


@pytest.mark.parametrize("precision", BOUNDS)
def test_a_row_of_zeros_stays(precision):
    weight = torch.zeros(2, 32)
    weight[1, 3] = 1
    found = widen(store(weight, precision), precision, torch.float32, 32)
    assert torch.equal(found[0], weight[0])
    assert torch.allclose(found[1], weight[1], rtol=4e-3)


def test_fp8_is_exact_on_fp8_numbers():
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    weight = numbers[numbers.isfinite()].reshape(2, -1) / 16
    for dtype in (torch.float32, torch.bfloat16):
        found = widen(store(weight, "fp8"), "fp8", dtype, weight.shape[1])
        assert torch.equal(found.float(), weight)


@pytest.mark.parametrize("precision", BOUNDS)
def test_bfloat16_widens_to_what_float32_does(precision):
    """Scales are bfloat16 numbers, so that no precision sees other ones."""
    stored = store(torch.randn(8, 64, generator=torch.Generator().manual_seed(1)), precision)
    wide = widen(stored, precision, torch.float32, 64)
    half = widen(stored, precision, torch.bfloat16, 64)
    assert torch.equal(half, wide.bfloat16())


@pytest.mark.parametrize("precision", BOUNDS)
def test_only_the_blocks_own_linear_layers_are_stored(precision):
    torch.manual_seed(0)
    model = Step1XEditTransformer2DModel(**tiny_transformer())
    before = dict(model.state_dict())
    store_linears(model, precision)
    stored = {name for name, module in model.named_modules() if isinstance(module, StoredLinear)}
    assert "transformer_blocks.0.attn.to_q" in stored
    assert "single_transformer_blocks.1.proj_mlp" in stored
    assert "connector.S.individual_token_refiner.blocks.0.mlp.fc1" in stored
    kept = [name for name in before if name.rpartition(".")[0] not in stored]
    assert {"x_embedder.weight", "proj_out.weight", "norm_out.linear.weight"} <= set(kept)
    assert "transformer_blocks.0.norm1.linear.weight" in kept
    after = model.state_dict()
    assert all(after[name] is not None and after[name].equal(before[name]) for name in kept)
    biases = [f"{name}.bias" for name in stored]
    assert all(after[name].equal(before[name]) for name in biases)
    assert model.dtype == torch.float32
    bits = {name: after[f"{name}.weight"].clone() for name in stored}
    model.to(torch.bfloat16)  # touches no stored weight
    assert all(model.get_parameter(f"{name}.weight").equal(bits[name]) for name in stored)


def test_a_stored_layer_is_a_linear_layer_to_adapters():
    layer = StoredLinear(8, 4, True, "int8", torch.bfloat16)
    assert isinstance(layer, nn.Linear)
    assert not layer.weight.requires_grad
    assert "int8" in repr(layer)
