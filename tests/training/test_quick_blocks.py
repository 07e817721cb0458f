"""The quick form of the blocks gives the plain form's losses and gradients."""

import copy

import pytest
import torch

from step1x_edit.model.guidance import prepare_ids
from step1x_edit.model.instruction import InstructionFeatures
from step1x_edit.model.transformer import Step1XEditTransformer2DModel
from step1x_edit.training import quick_blocks, quick_ops
from step1x_edit.training.quick_blocks import can_quicken, quicken

pytestmark = pytest.mark.skipif(not can_quicken(), reason="no bfloat16 matrix products here")

TEXT, GRID = 40, (4, 4)
TARGETS = GRID[0] * GRID[1]
LENGTHS = (5, 0, 9, 12, 3, 40)


@pytest.fixture(autouse=True)
def several_groups(monkeypatch):
    """Of four rows, or of two with a reference."""
    monkeypatch.setattr(quick_blocks, "GROUP_TOKENS", 4 * TARGETS)


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    return Step1XEditTransformer2DModel(
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=3,
        axes_dims_rope=(4, 14, 14),
        joint_attention_dim=48,
        vector_in_dim=48,
        connector_in_channels=48,
        connector_hidden_size=48,
        connector_heads_num=4,
    )


def inputs(with_reference):
    """Noisy and reference tokens, zero-padded features with their mask, and the times."""
    generator = torch.Generator().manual_seed(1)
    num_image = TARGETS * (1 + with_reference)
    mask = torch.arange(TEXT) < torch.tensor(LENGTHS)[:, None]
    features = torch.randn(len(LENGTHS), TEXT, 48, generator=generator) * mask[..., None]
    tokens = torch.randn(len(LENGTHS), num_image, 64, generator=generator)
    return (
        tokens,
        InstructionFeatures(features, mask),
        torch.tensor([0.2, 0.7, 0.95, 0.5, 0.99, 0.05]),
    )


def loss_and_gradients(transformer, with_reference, features=None):
    """Of the target's velocities alone, which is all that training asks for."""
    transformer.zero_grad(set_to_none=True)
    tokens, own, times = inputs(with_reference)
    features = features or own
    img_ids, txt_ids = prepare_ids(
        features.features.shape[1], GRID, GRID if with_reference else None, "v1.1"
    )
    velocity = transformer(
        tokens, features.features, features.mask, times, img_ids, txt_ids
    ).sample[:, :TARGETS]
    loss = velocity.float().square().mean()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in transformer.parameters()])


def quick_loss_and_gradients(transformer, with_reference):
    quick = quicken(transformer)
    tokens, features, _ = inputs(with_reference)
    trimmed = quick.trim(features, tokens.shape[1])
    quick.own.num_targets = TARGETS
    try:
        return quick.own.packing, *loss_and_gradients(transformer, with_reference, trimmed)
    finally:
        quick.remove()


def error(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("has_matrix_unit", [False, True])
@pytest.mark.parametrize("with_reference", [False, True])
def test_losses_and_gradients_are_the_plain_form_s(
    transformer, with_reference, has_matrix_unit, monkeypatch
):
    monkeypatch.setattr(quick_ops, "HAS_MATRIX_UNIT", has_matrix_unit)
    loss, gradients = loss_and_gradients(transformer, with_reference)
    packing, quick_loss, quick_gradients = quick_loss_and_gradients(transformer, with_reference)
    assert packing.text == ((8, 16, 40) if with_reference else (16, 40))
    assert quick_loss == pytest.approx(loss, rel=1e-5)
    assert error(quick_gradients, gradients) <= 1e-5


def test_bfloat16_is_as_near_to_float32_as_the_plain_form_s(transformer):
    _, exact = loss_and_gradients(transformer, True)
    with torch.autocast("cpu", torch.bfloat16):
        plain_loss, plain = loss_and_gradients(transformer, True)
        _, quick_loss, quick = quick_loss_and_gradients(transformer, True)
    assert quick_loss == pytest.approx(plain_loss, rel=5e-3)
    assert error(quick, exact) <= 1.25 * error(plain, exact)


def test_nothing_is_left_when_removed(transformer):
    plain = copy.deepcopy(transformer)
    quicken(transformer).remove()
    assert loss_and_gradients(transformer, True)[0] == loss_and_gradients(plain, True)[0]


def test_rows_without_padding_keep_every_token(transformer):
    quick = quicken(transformer)
    quick.remove()
    mask = torch.ones(2, TEXT, dtype=torch.bool)
    features = InstructionFeatures(torch.randn(2, TEXT, 48), mask)
    assert quick.trim(features, TARGETS).features.shape[1] == TEXT
    assert all(bool((bias == 0).all()) for bias in quick.own.padding_bias)


def test_padding_counts_as_often_as_it_stood_there(transformer):
    """A weight of one for each would be another network: the test above can fail."""
    loss, _ = loss_and_gradients(transformer, True)
    quick = quicken(transformer)
    tokens, features, _ = inputs(True)
    trimmed = quick.trim(features, tokens.shape[1])
    quick.own.padding_bias = tuple(0 * bias for bias in quick.own.padding_bias)
    wrong, _ = loss_and_gradients(transformer, True, trimmed)
    quick.remove()
    assert abs(wrong - loss) > 1e-4 * loss
