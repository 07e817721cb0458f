"""What is kept of a dataset: checks that each name the reason why a record is dropped.

The checks of the record alone are functions of a triplet; those that compare it with earlier ones
remember what they saw. Models come in as roles (`TextReader`, `SafetyRater`, `Judge`): anything
with that method will do. Called by ``step1x data filter``.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image
from scipy import ndimage

from step1x_edit.datagen.backgrounds import Picture
from step1x_edit.datagen.records import Triplet

Check = Callable[[Triplet], str | None]
"""Triplet → why it is dropped, or None."""

HASH_SIDE = 8
CLEARLY = 4
"""Of 255: in a plain area noise decides which of two places is lighter."""
BAND_BITS = 16
"""Hashes that differ in fewer bits than there are bands agree in one band at least."""


@runtime_checkable
class TextReader(Protocol):
    """Reads what is written in a picture."""

    def read(self, picture: Picture) -> str:
        """All text, in any order."""
        ...


@runtime_checkable
class SafetyRater(Protocol):
    """Says how unsafe a picture is."""

    def rate(self, picture: Picture) -> float:
        """0 is harmless, 1 is not."""
        ...


@runtime_checkable
class Judge(Protocol):
    """Says how well a target follows its instruction."""

    def score(self, triplet: Triplet) -> float:
        """0 to 10."""
        ...


@dataclass(frozen=True)
class Limits:
    """What a record must reach; see the checks for the units."""

    sharpness: float = 6.0
    exposure: tuple[float, float] = (12.0, 243.0)
    clipped_share: float = 0.85
    changed_share: float = 0.005
    change: float = 14.0
    outside_db: float = 34.0
    hash_bits: int = 3
    unsafe: float = 0.5
    judged: float = 6.0


WHOLE_PICTURE = ("tone", "style", "background")
"""Categories that leave nothing as it was."""


def sharp_enough(limits: Limits) -> Check:
    """Standard deviation of the source's Laplacian, of 255: a blurred photograph has little."""

    def check(triplet: Triplet) -> str | None:
        value = float(ndimage.laplace(_grey(triplet.source)).std())
        # A scene of plain colours is no blurred photograph: it has few edges, but hard ones.
        hardest = float(np.abs(ndimage.laplace(_grey(triplet.source))).max())
        return None if value >= limits.sharpness or hardest >= 128 else "blurred source"

    return check


def well_exposed(limits: Limits) -> Check:
    """Mean lightness of the source, of 255, and the share of pixels at one end of the scale."""

    def check(triplet: Triplet) -> str | None:
        grey = _grey(triplet.source)
        low, high = limits.exposure
        if not low <= grey.mean() <= high:
            return "source too dark" if grey.mean() < low else "source too bright"
        if max((grey <= 2).mean(), (grey >= 253).mean()) > limits.clipped_share:
            return "source clipped"
        return None

    return check


def changed_enough(limits: Limits) -> Check:
    """Share of the pixels that change, and their root mean square change, of 255."""

    def check(triplet: Triplet) -> str | None:
        if triplet.edit.unchanged:
            return None
        if triplet.mask.mean() < limits.changed_share:
            return "change too small"
        return "change too faint" if _rms(triplet, triplet.mask) < limits.change else None

    return check


def kept_outside(limits: Limits) -> Check:
    """PSNR in dB between source and target outside the mask, for edits that are local."""

    def check(triplet: Triplet) -> str | None:
        if triplet.category in WHOLE_PICTURE or triplet.mask.all():
            return None
        rms = _rms(triplet, ~triplet.mask)
        kept = rms == 0 or 20 * np.log10(255 / rms) >= limits.outside_db
        return None if kept else "changed outside the mask"

    return check


def text_reads(reader: TextReader) -> Check:
    """The new words of a text edit can be read in the target, whatever the case and spacing."""

    def check(triplet: Triplet) -> str | None:
        wanted = triplet.edit.words.get("en", {}).get("new_text")
        if triplet.category != "text" or not wanted or triplet.edit.phrasing == "text_removal":
            return None
        return None if _plain(wanted) in _plain(reader.read(triplet.target)) else "text unread"

    return check


def safe(rater: SafetyRater, limits: Limits) -> Check:
    """Neither picture is rated unsafe."""

    def check(triplet: Triplet) -> str | None:
        worst = max(rater.rate(triplet.source), rater.rate(triplet.target))
        return None if worst < limits.unsafe else "unsafe"

    return check


def judged_well(judge: Judge, limits: Limits) -> Check:
    """The judge's score."""

    def check(triplet: Triplet) -> str | None:
        return None if judge.score(triplet) >= limits.judged else "judged badly"

    return check


class NotSeenBefore:
    """Drops a record when an earlier one has nearly the same pictures and the same instruction.

    Pictures are compared by the difference hash of source and target (128 bits); instructions
    without case, punctuation and courtesies.

    Args:
        limits: `hash_bits` is how many bits of the two hashes may differ.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        if limits.hash_bits >= 2 * HASH_SIDE**2 // BAND_BITS:
            raise ValueError(
                f"hash_bits {limits.hash_bits}: must be below {2 * HASH_SIDE**2 // BAND_BITS}"
            )
        self._seen: dict[tuple[int, int, str], list[Bool[np.ndarray, " bits"]]] = {}

    def __call__(self, triplet: Triplet) -> str | None:
        """Check, and remember."""
        bits = np.concatenate([difference_hash(triplet.source), difference_hash(triplet.target)])
        words = plain_instruction(triplet.instructions["en"])
        bands = [
            (number, int(np.packbits(band).view(np.uint16)[0]), words)
            for number, band in enumerate(bits.reshape(-1, BAND_BITS))
        ]
        near = any(
            np.count_nonzero(bits != other) <= self.limits.hash_bits
            for band in bands
            for other in self._seen.get(band, ())
        )
        if near:
            return "seen before"
        for band in bands:
            self._seen.setdefault(band, []).append(bits)
        return None


def difference_hash(picture: Picture) -> Bool[np.ndarray, " bits"]:
    """Whether each place of an 8 × 8 grid is clearly lighter than its right neighbour (64 bits)."""
    small = Image.fromarray(picture).convert("L")
    pixels = np.asarray(small.resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BOX), np.int16)
    return (pixels[:, 1:] < pixels[:, :-1] - CLEARLY).ravel()


COURTESIES = re.compile(r"\b(please|can you|could you|i want you to|now)\b|请|帮我|麻烦")


def plain_instruction(words: str) -> str:
    """An instruction without case, punctuation, articles and courtesies."""
    bare = COURTESIES.sub(" ", words.lower())
    return " ".join(word for word in re.findall(r"\w+", bare) if word not in ("a", "an", "the"))


def default_checks(
    limits: Limits | None = None,
    *,
    reader: TextReader | None = None,
    rater: SafetyRater | None = None,
    judge: Judge | None = None,
) -> list[Check]:
    """All checks that can be made with the roles at hand, cheap ones first."""
    limits = limits or Limits()
    checks = [
        sharp_enough(limits),
        well_exposed(limits),
        changed_enough(limits),
        kept_outside(limits),
        NotSeenBefore(limits),
    ]
    if reader is not None:
        checks.append(text_reads(reader))
    if rater is not None:
        checks.append(safe(rater, limits))
    if judge is not None:
        checks.append(judged_well(judge, limits))
    return checks


@dataclass
class Drops:
    """How many records were kept, and why the others were not."""

    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """A table for people."""
        total = self.kept + self.dropped.total()
        rows = [("kept", self.kept), *self.dropped.most_common()]
        return [f"{count:8d}  {count / max(total, 1):6.1%}  {name}" for name, count in rows]


def keep(triplets: Iterable[Triplet], checks: Iterable[Check], drops: Drops) -> Iterator[Triplet]:
    """The records that pass every check; the first one that fails is counted in `drops`."""
    checks = list(checks)
    for triplet in triplets:
        reason = next((why for check in checks if (why := check(triplet)) is not None), None)
        if reason is None:
            drops.kept += 1
            yield triplet
        else:
            drops.dropped[reason] += 1


def _grey(picture: Picture) -> Float[np.ndarray, "height width"]:
    return picture @ np.asarray([0.299, 0.587, 0.114], np.float32)


def _rms(triplet: Triplet, where: Bool[np.ndarray, "height width"]) -> float:
    difference = triplet.target[where].astype(np.float32) - triplet.source[where]
    return float(np.sqrt(np.square(difference).mean())) if where.any() else 0.0


def _plain(text: str) -> str:
    return "".join(re.findall(r"\w", text.lower()))
