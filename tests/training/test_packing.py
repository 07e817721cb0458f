"""Packed rows are the padded rows without their padding."""

import pytest
import torch

from step1x_edit.training.packing import Packing, divide, join

PACKING = Packing((slice(0, 2), slice(2, 5)), text=(3, 1), num_image=4)
LENGTHS = (3, 3, 1, 1, 1)


def numbered(length, dim=2):
    """(5, length, dim) of numbers that say where they come from."""
    return torch.arange(5.0 * length * dim).view(5, length, dim)


def rows_of(packed, lengths):
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [packed[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def test_groups_are_views():
    packed = torch.zeros(PACKING.num_tokens, 2)
    groups = PACKING.cut(packed)
    assert [tuple(group.shape) for group in groups] == [(2, 7, 2), (3, 5, 2)]
    groups[1] += 1
    assert packed[:14].eq(0).all()
    assert packed[14:].eq(1).all()


def test_joined_rows_hold_their_text_then_their_picture():
    text, image = numbered(3), 100 + numbered(4)
    tokens = join(PACKING.only_text().pack(text), image.flatten(0, 1), PACKING)
    for i, row in enumerate(rows_of(tokens, [length + 4 for length in LENGTHS])):
        assert torch.equal(row, torch.cat([text[i, : LENGTHS[i]], image[i]]))


def test_divide_undoes_join():
    texts, images = torch.randn(9, 2), torch.randn(20, 2)
    parts = divide(join(texts, images, PACKING), PACKING)
    assert torch.equal(parts[0], texts)
    assert torch.equal(parts[1], images)


def test_first_picture_tokens_alone():
    image = numbered(4)
    asked = PACKING.only_image(2)
    assert torch.equal(asked.pack(image), image[:, :2].flatten(0, 1))


@pytest.mark.parametrize("whole", [False, True])
def test_gradients(whole):
    inputs = [torch.randn(9, 2), torch.randn(20, 2)]
    if whole:
        inputs = [torch.randn(29, 2)]
    inputs = [part.double().requires_grad_() for part in inputs]
    assert torch.autograd.gradcheck(divide if whole else join, (*inputs, PACKING))
