import numpy as np
import pytest
import torch
from torch import nn

from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.pipeline import make_triplet
from step1x_edit.datagen.variety import PLAIN
from step1x_edit.model.latents import PIXELS_PER_TOKEN
from step1x_edit.training.alignment import (
    BACKGROUND_LABELS,
    COLOUR_LABELS,
    NUM_CLASSES,
    OBJECT_LABELS,
    TONE_LABELS,
    UNKNOWN,
    SceneHead,
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


def test_the_head_learns_what_the_tokens_show():
    torch.manual_seed(0)
    block = Passing()
    head = SceneHead(block, block, 8)
    tokens = torch.randn(2, 6, 8)
    labels = torch.stack([torch.randint(count, (2, 6)) for count in NUM_CLASSES], -1)
    labels[:, :3, 2] = UNKNOWN
    optimizer = torch.optim.Adam(head.parameters(), 0.1)
    losses = []
    for _ in range(60):
        block(tokens)
        loss = head.loss(labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_labels_that_are_all_unknown_do_not_spoil_the_loss():
    block = Passing()
    head = SceneHead(block, block, 8)
    labels = torch.zeros(1, 4, 5, dtype=torch.long)
    labels[..., 2] = UNKNOWN
    block(torch.randn(1, 4, 8))
    assert torch.isfinite(head.loss(labels))


def test_the_change_is_read_from_the_later_block():
    shown, meant = Passing(), Passing()
    head = SceneHead(shown, meant, 8)
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


class Passing(nn.Module):
    """Gives back (text, image) as a transformer block does."""

    def forward(self, tokens):
        return tokens, tokens
