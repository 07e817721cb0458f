"""From a folder of photographs to a filtered dataset: the engine of ``step1x data photographs``.

Categories take turns, so that each gets its share, and so do photographs; what a photograph does
not lend itself to is counted by its reason, next to what the filters drop.
"""

import json
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.backgrounds import Picture, Pixels
from step1x_edit.datagen.captions import LANGUAGES, phrase, wordings
from step1x_edit.datagen.filters import Check, Drops, keep
from step1x_edit.datagen.generate import MANIFEST
from step1x_edit.datagen.operators.base import Edit
from step1x_edit.datagen.photographs.edits import EDITS, Draft, Shot
from step1x_edit.datagen.photographs.frames import motion_of_pair
from step1x_edit.datagen.photographs.roles import Parts, Unsuitable
from step1x_edit.datagen.photographs.sources import Source, sources_in
from step1x_edit.datagen.pipeline import record_seed
from step1x_edit.datagen.records import UNDESCRIBED, Triplet
from step1x_edit.datagen.refine import DROPS
from step1x_edit.datagen.shards import new_folder, write
from step1x_edit.errors import InvalidRequest
from step1x_edit.files import write_text

MOST_ENLARGED = 1.5
LEAST_CROP = 0.75
"""Of the largest crop of the wanted shape."""
MOST_FAILURES = 4
"""In a row: a photograph is then not tried again for that category."""
MOST_RECORDS = 4
"""Of one photograph in one category: more would say the same of the same thing."""

Labels = Mapping[str, tuple[str, str]]
"""File name → what the photograph's subject is called in English and Chinese."""


@dataclass(frozen=True)
class Run:
    """What is asked for."""

    folder: Path
    out: Path
    num: int
    """Records wanted."""
    seed: int = 0
    size: tuple[int, int] = (256, 256)
    """Width and height of the pictures in pixels."""
    categories: tuple[str, ...] = tuple(EDITS)
    labels: Labels = field(default_factory=dict)
    shard_size: int = 500


@dataclass
class Report:
    """What a run did."""

    drops: Drops = field(default_factory=Drops)
    categories: Counter[str] = field(default_factory=Counter)
    unreadable: dict[str, str] = field(default_factory=dict)
    """Name of a file → why it could not be read."""

    def lines(self) -> list[str]:
        """For people."""
        shares = ", ".join(f"{name} {count}" for name, count in sorted(self.categories.items()))
        bad = [f"unreadable: {reason}" for reason in self.unreadable.values()]
        return [*self.drops.lines(), shares, *bad]


def make_dataset(
    run: Run,
    parts: Parts,
    checks: Sequence[Check],
    on_progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Write shards of the triplets that pass every check, and beside them what was dropped.

    A shard appears whole or not at all. There are fewer records than were asked for where the
    photographs do not lend themselves to more.

    Args:
        run: What is asked for.
        parts: What finds, cuts, fills and paints.
        checks: See `filters.default_checks`.
        on_progress: Called with the records kept and the records wanted.

    Raises:
        InvalidRequest: The folder holds no photographs, or none that a triplet could be made of;
            or `out` holds something.
    """
    sources = sources_in(run.folder)
    new_folder(run.out)
    report = Report()
    kept = _kept(run, sources, parts, list(checks), report, on_progress)
    number = 0
    while group := list(islice(kept, run.shard_size)):
        write(run.out / f"shard-{number:06d}.tar", group)
        number += 1
    if number == 0:
        run.out.rmdir()
        reasons = [*report.unreadable.values(), *dict(report.drops.dropped.most_common())]
        raise InvalidRequest(f"no triplet could be made of {run.folder}: {reasons[0]}")
    _write_json(run.out / MANIFEST, _manifest(run, parts))
    counts = {"kept": report.drops.kept, "dropped": dict(report.drops.dropped.most_common())}
    _write_json(run.out / DROPS, counts | {"unreadable": report.unreadable})
    return report


def edit_photograph(
    source: Source, category: str, parts: Parts, atlas: Atlas, seed: int,
    size: tuple[int, int] = (256, 256), label: tuple[str, str] | None = None,
) -> Triplet:  # fmt: skip
    """Make a triplet of one photograph, or of two frames.

    Args:
        source: Where the pictures come from.
        category: Key of `edits.EDITS`.
        parts: What finds, cuts, fills and paints.
        atlas: The art.
        seed: Equal seeds give equal triplets, as far as the parts do.
        size: Width and height of the result in pixels; the photograph is cropped to it.
        label: What the subject is called in English and Chinese, where that is known.

    Raises:
        InvalidRequest: A file cannot be read.
        Unsuitable: The photograph does not lend itself to the edit.
    """
    rng = np.random.default_rng([seed, *size])
    first, *later = _cropped(source.pictures(), size, rng)
    shot = Shot(first, parts, atlas, rng, seed, label)
    moving = category == "motion" and later and parts.flow is not None
    draft = motion_of_pair(shot, later[0]) if moving else EDITS[category](shot)
    before = first if draft.source is None else _bytes(draft.source)
    after = _bytes(draft.target)
    instructions, made_by = _instructions(rng, draft), draft.made_by
    if parts.captioner is not None:
        instructions = parts.captioner.write(before, after, instructions)
        made_by = (*made_by, parts.captioner.name)
    edit = Edit(UNDESCRIBED, draft.after, draft.phrasing, draft.words, made_by=made_by)
    mask = (before != after).any(-1)
    return Triplet(category, before, after, mask, instructions, {}, edit, seed, source.name)


def _kept(
    run: Run, sources: list[Source], parts: Parts, checks: list[Check], report: Report,
    on_progress: Callable[[int, int], None] | None,
) -> Iterator[Triplet]:  # fmt: skip
    """The records that are kept; the category with the fewest is next."""
    atlas, tries = Atlas(), 0
    failures, made = Counter[tuple[str, Source]](), Counter[tuple[str, Source]]()
    # Each category begins at another photograph, or all would be made of the first ones.
    offsets = np.linspace(0, len(sources), len(run.categories), endpoint=False).astype(int)
    waiting = {
        category: deque([*sources[offset:], *sources[:offset]])
        for category, offset in zip(run.categories, offsets, strict=True)
    }
    while report.drops.kept < run.num and any(waiting.values()):
        category = min(filter(waiting.get, waiting), key=lambda name: report.categories[name])
        source = waiting[category].popleft()
        if source.name in report.unreadable:
            continue
        seed = record_seed(run.seed, tries)
        tries += 1
        label = run.labels.get(source.name)
        try:
            triplet = edit_photograph(source, category, parts, atlas, seed, run.size, label)
        except InvalidRequest as error:
            report.unreadable[source.name] = str(error)
            continue
        except Unsuitable as reason:
            report.drops.dropped[f"{category}: {reason}"] += 1
            triplet = None
        if triplet is not None and any(keep([triplet], checks, report.drops)):
            failures[category, source] = 0
            made[category, source] += 1
            report.categories[category] += 1
            if on_progress is not None:
                on_progress(report.drops.kept, run.num)
            yield triplet
        else:
            failures[category, source] += 1
        if failures[category, source] < MOST_FAILURES and made[category, source] < MOST_RECORDS:
            waiting[category].append(source)


def _instructions(rng: np.random.Generator, draft: Draft) -> dict[str, str]:
    """One wording per language; words in a photograph need not stand on a sign."""
    if not draft.phrasing.startswith("text"):
        return phrase(rng, draft.phrasing, draft.words)
    return {
        language: str(rng.choice(_of_no_sign(draft.phrasing, language))).format(
            **draft.words[language]
        )
        for language in LANGUAGES
    }


def _of_no_sign(kind: str, language: str) -> list[str]:
    return [words for words in wordings(kind, language) if "{old_text}" in words]


def _cropped(
    pictures: Sequence[Image.Image], size: tuple[int, int], rng: np.random.Generator
) -> list[Picture]:
    """The same random crop of all pictures, of the wanted shape and near the largest there is."""
    first = pictures[0]
    if any(picture.size != first.size for picture in pictures):
        raise Unsuitable("frames of two sizes")
    scale = min(first.width / size[0], first.height / size[1])
    if scale < 1 / MOST_ENLARGED:
        raise Unsuitable("photograph too small")
    share = scale * rng.uniform(LEAST_CROP, 1.0)
    across, down = size[0] * share, size[1] * share
    left, top = rng.uniform(0, first.width - across), rng.uniform(0, first.height - down)
    box = (left, top, left + across, top + down)
    return [np.asarray(p.resize(size, Image.Resampling.LANCZOS, box)) for p in pictures]


def _bytes(pixels: Pixels) -> Picture:
    return (pixels.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _manifest(run: Run, parts: Parts) -> dict[str, Any]:
    names = {role: part.name for role, part in vars(parts).items() if part is not None}
    asked = {"num": run.num, "seed": run.seed, "size": list(run.size)}
    return {"photographs": asked | {"categories": list(run.categories), "parts": names}}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_text(path, json.dumps(values, ensure_ascii=False, indent=1) + "\n")
