"""From a seed to triplets: the stream that training and evaluation read.

A triplet is a pure function of (seed, category, size), so any number of workers make the same set.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Int16

from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.backgrounds import Pixels
from step1x_edit.datagen.captions import phrase
from step1x_edit.datagen.operators import OPERATORS, Context, Edit
from step1x_edit.datagen.operators.compound import followed, nothing
from step1x_edit.datagen.records import Triplet
from step1x_edit.datagen.scene import captions_of, render
from step1x_edit.datagen.variety import EVERYTHING, Variety

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
SECOND = tuple(name for name, operator in OPERATORS.items() if operator.second is not None)
"""Categories that can follow another edit."""
MAY_BE_EMPTY = ("colour", "removal", "motion")
"""Categories of which some instructions ask for nothing."""
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
    variety: Variety = EVERYTHING,
) -> Triplet:
    """The triplet of a seed.

    Args:
        seed: Non-negative; equal seeds give equal triplets.
        category: Key of `operators.OPERATORS`.
        atlas: The art.
        width: Picture width in pixels.
        height: Picture height in pixels.
        variety: What may happen beyond one plain edit.
    """
    context = Context(np.random.default_rng([seed, width, height]), atlas, variety)
    while True:
        edit = draw_edit(context, category, width, height)
        source, target = render(edit.before, atlas), render(edit.after, atlas)
        source = _to_bytes(edit.spoil(source) if edit.spoil else source)
        target = _to_bytes(edit.finish(target) if edit.finish else target)
        difference = target.astype(np.int16) - source
        red, green, blue = np.moveaxis(source != target, -1, 0)
        mask = red | green | blue  # `any` is slow over so short an axis
        # An object wholly hidden, or a tone that changes next to nothing: draw again.
        seen = mask.mean() >= MIN_CHANGED_SHARE and _change(difference, mask) >= MIN_CHANGE
        if seen or edit.unchanged:
            break
    captions = captions_of(edit.after) if edit.is_local else {}
    return Triplet(
        category, source, target, mask, instructions_of(context, edit), captions, edit, seed
    )


def draw_edit(context: Context, category: str, width: int, height: int) -> Edit:
    """An edit of the category: alone, with a second one after it, or an empty request instead.

    Nothing is rendered yet.
    """
    while (edit := OPERATORS[category].first(context, width, height)) is None:
        pass
    if category in MAY_BE_EMPTY and context.happens(context.variety.unchanged):
        return nothing(context, edit.before)
    if edit.is_local and category != "style" and context.happens(context.variety.compound):
        second = OPERATORS[context.pick(name for name in SECOND if name != category)].second
        assert second is not None  # `SECOND` lists those that have one
        return followed(context, edit, second)
    return edit


def instructions_of(context: Context, edit: Edit) -> dict[str, str]:
    """Language → instruction; the halves of a compound one are short."""
    tier = context.variety.wordings
    if edit.second is None:
        return phrase(context.rng, edit.phrasing, edit.words, tier)
    first = phrase(context.rng, edit.phrasing, edit.words, "plain")
    second = phrase(context.rng, edit.second.phrasing, edit.second.words, "plain")
    halves = {
        language: {"first": first[language], "second": second[language]} for language in first
    }
    return phrase(context.rng, "then", halves, tier)


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


def _change(
    difference: Int16[np.ndarray, "height width 3"], mask: Bool[np.ndarray, "height width"]
) -> float:
    """Root mean square of the change where there is one; it is nowhere else."""
    flat = difference.ravel().astype(np.float32)
    return float(np.sqrt(np.dot(flat, flat) / (3 * np.count_nonzero(mask))))


def _to_bytes(picture: Pixels) -> np.ndarray:
    return (picture.clip(0, 1) * 255 + 0.5).astype(np.uint8)
