import numpy as np
import pytest
import torch
from torch import eye, nn

from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.pipeline import make_triplet
from step1x_edit.datagen.variety import PLAIN
from step1x_edit.model.latents import PIXELS_PER_TOKEN
from step1x_edit.training.alignment import (
    BACKGROUND_LABELS,
    COLOUR_LABELS,
    MAX_SIDE,
    NUM_CLASSES,
    OBJECT_LABELS,
    TONE_LABELS,
    UNKNOWN,
    SceneHead,
    changed_cells,
    token_labels,
)


@pytest.fixture(scope="module")
def atlas():
    return Atlas()


def split(triplet, atlas):
    labels = token_labels(triplet, atlas)
    return labels[: len(labels) // 2], labels[len(labels) // 2 :]


@pytest.mark.parametrize("seed", range(6))
def test_an_added_object_is_in_the_targets_labels_alone(seed, atlas):
    triplet = make_triplet(seed, "addition", atlas, 128, 96, PLAIN)
    target, reference = split(triplet, atlas)
    added = triplet.edit.after.objects[-1]
    assert OBJECT_LABELS[added.name] in target[:, 0]
    assert OBJECT_LABELS[added.name] not in reference[:, 0]
    row, column = int(added.y * 96) // PIXELS_PER_TOKEN, int(added.x * 128) // PIXELS_PER_TOKEN
    token = target[row * (128 // PIXELS_PER_TOKEN) + column]
    assert list(token[:2]) == [OBJECT_LABELS[added.name], COLOUR_LABELS[added.colour]]
    assert token[4] == 1


@pytest.mark.parametrize("seed", range(4))
def test_background_and_tone_stand_at_every_token(seed, atlas):
    triplet = make_triplet(seed, "background", atlas, variety=PLAIN)
    target, reference = split(triplet, atlas)
    assert set(target[:, 2]) == {BACKGROUND_LABELS[triplet.edit.after.background_name]}
    before = triplet.edit.before.background_name
    assert set(reference[:, 2]) == {UNKNOWN if before is None else BACKGROUND_LABELS[before]}
    triplet = make_triplet(seed, "tone", atlas, variety=PLAIN)
    target, reference = split(triplet, atlas)
    assert set(target[:, 3]) == {TONE_LABELS[triplet.edit.phrasing]}
    assert set(reference[:, 3]) == {0}


def test_tokens_outside_the_change_have_equal_labels(atlas):
    target, reference = split(make_triplet(3, "removal", atlas), atlas)
    same = target[:, 4] == 0
    assert same.any()
    np.testing.assert_array_equal(target[same], reference[same])


CELLS_OF_6 = torch.zeros(2, 6, 16)


def test_the_head_learns_what_the_tokens_show():
    torch.manual_seed(0)
    block = Passing()
    head = SceneHead(block, block, block, 8)
    tokens = torch.randn(2, 6, 8)
    labels = torch.stack([torch.randint(count, (2, 6)) for count in NUM_CLASSES], -1)
    labels[:, :3, 2] = UNKNOWN
    optimizer = torch.optim.Adam(head.parameters(), 0.1)
    losses = []
    for _ in range(60):
        block(tokens)
        loss = head.loss(labels, CELLS_OF_6, (2, 3))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_labels_that_are_all_unknown_do_not_spoil_the_loss():
    block = Passing()
    head = SceneHead(block, block, block, 8)
    labels = torch.zeros(1, 4, 5, dtype=torch.long)
    labels[..., 2] = UNKNOWN
    block(torch.randn(1, 4, 8))
    assert torch.isfinite(head.loss(labels, torch.zeros(1, 4, 16), (2, 2)))


def test_the_change_is_read_from_the_later_block():
    shown, meant = Passing(), Passing()
    head = SceneHead(Passing(), shown, meant, 8)
    first, second = torch.randn(2, 1, 4, 8)
    shown(first)
    meant(second)
    *scene, changed = head.logits()
    assert [part.shape[-1] for part in scene] == list(NUM_CLASSES[:-1])
    shown(first)
    meant(first)
    *same, other = head.logits()
    assert all(torch.equal(a, b) for a, b in zip(scene, same, strict=True))
    assert not torch.equal(changed, other)


def test_the_place_is_the_targets_and_the_references():
    # Tokens that hold their row and column one-hot, target then reference, of a grid of 2 × 3.
    block = Passing()
    head = SceneHead(block, block, block, 2 * MAX_SIDE)
    rows, columns = torch.arange(6) // 3, torch.arange(6) % 3
    places = torch.cat([eye(MAX_SIDE)[rows], eye(MAX_SIDE)[columns]], -1).repeat(2, 1)[None]
    head.locate.weight.data, head.locate.bias.data = 20 * eye(2 * MAX_SIDE), 0 * head.locate.bias
    labels = torch.zeros(1, 12, 5, dtype=torch.long)
    head.read.weight.data.zero_()
    losses = []
    for tokens in (places, places.roll(1, 1)):
        block(tokens)
        losses.append(head.loss(labels, CELLS_OF_6[:1], (2, 3)).item())
    assert losses[0] + 1 < losses[1]


def test_the_outline_is_the_changed_share_of_each_cell():
    mask = np.zeros((32, 48), bool)
    mask[:4, :8] = True  # two cells of the first token
    mask[16:, 32:] = True  # the last token
    mask[0, 16] = True  # one pixel of the second
    cells = changed_cells(mask)
    assert cells.shape == (6, 16)
    assert list(np.flatnonzero(cells[0])) == [0, 1]
    assert cells[1, 0] == 1 / 16
    assert cells[5].min() == 1
    assert cells.mean() == pytest.approx(mask.mean())


class Passing(nn.Module):
    """Gives back (text, image) as a transformer block does."""

    def forward(self, tokens):
        return tokens, tokens
