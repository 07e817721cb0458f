"""Whether the new words of text edits can be read by someone who was not told them."""

from collections import Counter

import pytest

from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.onnx_parts import RapidOcr
from step1x_edit.datagen.pipeline import make_triplet

OF_EACH_SORT = 10
"""Records with new words, changed or added, in Latin or Chinese letters: four sorts."""


def plain(text):
    return "".join(text.lower().split())


@pytest.mark.slow
@pytest.mark.parametrize("side", [128, 256])
def test_ocr_reads_the_new_text(side):
    atlas, reader = Atlas(), RapidOcr()
    tried, unread, seed = Counter(), [], 0
    while tried.total() < 4 * OF_EACH_SORT:
        triplet = make_triplet(seed, "text", atlas, side, side)
        seed += 1
        wanted = triplet.edit.words["en"]["new_text"]
        sort = (triplet.edit.phrasing, wanted.isascii())
        if triplet.edit.phrasing == "text_removal" or tried[sort] == OF_EACH_SORT:
            continue
        tried[sort] += 1
        lines = reader.read(triplet.target).splitlines()
        if plain(wanted) not in map(plain, lines):
            unread.append((triplet.seed, wanted, lines))
    assert len(unread) <= 0.05 * tried.total(), unread
