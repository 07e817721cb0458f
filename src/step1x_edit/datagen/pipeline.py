"""From a seed to triplets: the stream that training and evaluation read.

A triplet is a pure function of (seed, category, size), so any number of workers make the same set.
"""

from collections.abc import Mapping

import numpy as np

from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.backgrounds import Pixels
from step1x_edit.datagen.captions import phrase
from step1x_edit.datagen.learned_styles import SHARE as LEARNED_SHARE
from step1x_edit.datagen.learned_styles import StylePainter, in_learned_style
from step1x_edit.datagen.operators import OPERATORS
from step1x_edit.datagen.records import Triplet
from step1x_edit.datagen.scene import captions_of, render

DEFAULT_SHARES: Mapping[str, float] = {
    "addition": 0.1099, "removal": 0.1099, "replacement": 0.2198, "motion": 0.1319, "text": 0.0879,
    "background": 0.0659, "colour": 0.0659, "portrait": 0.0659, "style": 0.0549, "tone": 0.0549,
    "material": 0.0330,
}  # fmt: skip
"""Those of the Step1X-Edit paper (Liu et al. 2025, arXiv 2504.17761)."""
HELD_OUT_SEED = 2**40
"""Seeds from here on are never trained on."""
STREAM_LENGTH = 2**24
"""Records of a stream before it would run into the next one."""
MIN_CHANGED_SHARE = 0.005
"""Least share of the pixels that an edit must change."""
MIN_CHANGE = 14.0
"""Least root mean square of the change where there is one, of 255."""


def make_triplet(
    seed: int,
    category: str,
    atlas: Atlas,
    width: int = 128,
    height: int = 128,
    painter: StylePainter | None = None,
) -> Triplet:
    """The triplet of a seed.

    Args:
        seed: Non-negative; equal seeds give equal triplets.
        category: Key of `operators.OPERATORS`.
        atlas: The art.
        width: Picture width in pixels.
        height: Picture height in pixels.
        painter: Paints the share of the style edits that has learned styles; None: there are none.
    """
    rng = np.random.default_rng([seed, width, height])
    while True:
        edit = OPERATORS[category](rng, atlas, width, height)
        if painter is not None and category == "style" and rng.random() < LEARNED_SHARE:
            edit = in_learned_style(edit, rng, painter)
        before = _to_bytes(render(edit.before, atlas))
        after = render(edit.after, atlas)
        after = _to_bytes(edit.finish(after) if edit.finish else after)
        mask = (before != after).any(-1)
        # An object wholly hidden, or a tone that changes next to nothing: draw again.
        if mask.mean() >= MIN_CHANGED_SHARE and _change(before, after, mask) >= MIN_CHANGE:
            break
    captions = {} if edit.finish else captions_of(edit.after)
    instructions = phrase(rng, edit.phrasing, edit.words)
    return Triplet(category, before, after, mask, instructions, captions, edit, seed)


def record_seed(stream: int, number: int, *, held_out: bool = False) -> int:
    """The seed of a record: streams share none, and held-out ones share none with the rest.

    Raises:
        ValueError: The stream or the number is too large.
    """
    seed = stream * STREAM_LENGTH + number
    if number >= STREAM_LENGTH or seed >= HELD_OUT_SEED:
        raise ValueError(
            f"record {number} of stream {stream}: a stream has {STREAM_LENGTH} records, and there "
            f"are {HELD_OUT_SEED // STREAM_LENGTH} streams"
        )
    return seed + HELD_OUT_SEED * held_out


def sample_category(rng: np.random.Generator, shares: Mapping[str, float]) -> str:
    """Draw a category by its share."""
    weights = np.asarray(list(shares.values()))
    return str(rng.choice(list(shares), p=weights / weights.sum()))


def _change(before: np.ndarray, after: np.ndarray, mask: np.ndarray) -> float:
    difference = after[mask].astype(np.float32) - before[mask]
    return float(np.sqrt(np.square(difference).mean()))


def _to_bytes(picture: Pixels) -> np.ndarray:
    return (picture.clip(0, 1) * 255 + 0.5).astype(np.uint8)
