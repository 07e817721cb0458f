"""The offline benchmark: held-out triplets of the data engine against their exact targets.

Edit gain is 1 − d(out, target) / d(source, target) inside the pixels that the edit changes, d the
mean squared error: 1 is the exact target, 0 is no better than doing nothing. Outside them the
result is compared with what the autoencoder alone makes of the source. Called by
``step1x bench mini``.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from step1x_edit import images
from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.operators import OPERATORS
from step1x_edit.datagen.pipeline import HELD_OUT_SEED, make_triplet
from step1x_edit.datagen.records import Triplet
from step1x_edit.datagen.signs import font_path
from step1x_edit.datagen.variety import PLAIN, Variety
from step1x_edit.editor import Editor
from step1x_edit.errors import InvalidRequest

CATEGORIES = tuple(OPERATORS)
"""What the mini model was trained on: all that the data engine draws."""
FIRST_SEED = HELD_OUT_SEED + 2**30
"""Where the benchmark's items begin; the trainer's held-out previews stay below it."""
SUCCESS_GAIN = 0.5
LEAST_OUTSIDE = 0.05
"""An item whose picture changes almost everywhere says nothing about the outside: the few pixels
that a blur or a tone happens to leave as they were are not what it was asked to leave."""
BATCH = 12
LABEL_PX = 11
"""Of Chinese words below a picture."""


@dataclass(frozen=True)
class ItemScore:
    """The measures of one item; the outside ones are None where there is next to no outside."""

    category: str
    seed: int
    language: str
    instruction: str
    gain: float
    psnr_outside: float | None
    psnr_outside_vae: float | None
    kept: float | None
    """Share of the outside pixels that are bit-identical after `images.restore` without a mask."""
    kept_with_mask: float | None
    """The same with the edit's mask given."""


@dataclass(frozen=True)
class CategoryScore:
    """Means over a category's items, in the order of the printed table.

    The outside ones are not a number where no item has an outside.
    """

    category: str
    items: int
    gain: float
    median_gain: float
    success: float
    psnr_outside: float
    psnr_outside_vae: float
    kept: float
    kept_with_mask: float


def chosen_categories(names: Sequence[str]) -> tuple[str, ...]:
    """The categories of a benchmark by name; all of them by "all", or by no name.

    Raises:
        InvalidRequest: There is none of that name.
    """
    for name in names:
        if name != "all" and name not in OPERATORS:
            raise InvalidRequest(
                f"category {name!r} is not there: give one of {', '.join(OPERATORS)}, or all"
            )
    if not names or "all" in names:
        return CATEGORIES
    return tuple(dict.fromkeys(names))


def run(
    editor: Editor,
    num_items: int = 60,
    categories: Sequence[str] = CATEGORIES,
    *,
    first: int = 0,
    size: tuple[int, int] = (128, 128),
    variety: Variety = PLAIN,
    out: Path | None = None,
    on_item: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> list[CategoryScore]:
    """Measure a model on held-out items, half of them in Chinese.

    Args:
        editor: The model.
        num_items: Items of each category.
        categories: Keys of `operators.OPERATORS`.
        first: Number of the first item: other ones than those that a model was tuned on.
        size: Width and height of the items in pixels.
        variety: What the items may ask for beyond one plain edit.
        out: Where to write ``scores.json`` and a contact sheet per category; None writes nothing.
        on_item: Called with the items done and the items in all.
        settings: Passed on to the pipeline (``num_inference_steps``, ``guidance_scale`` …).
    """
    atlas = Atlas()
    scores: list[ItemScore] = []
    end = FIRST_SEED + first + num_items
    for category in categories:
        rows = []
        for start in range(FIRST_SEED + first, end, BATCH):
            seeds = range(start, min(start + BATCH, end))
            triplets = [make_triplet(seed, category, atlas, *size, variety) for seed in seeds]
            for row in measure(editor, triplets, **settings):
                rows.append(row)
                scores.append(row[-1])
                if on_item is not None:
                    on_item(len(scores), num_items * len(categories))
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            contact_sheet(rows).save(out / f"{category}.png")
    if out is not None:
        (out / "scores.json").write_text(as_json(scores, indent=1) + "\n", encoding="utf-8")
    return [mean_score(category, scores) for category in categories]


def measure(
    editor: Editor, triplets: list[Triplet], **settings: Any
) -> Iterator[tuple[Triplet, np.ndarray, ItemScore]]:
    """Edit triplets of one size together, and measure each result.

    Args:
        editor: The loaded model.
        triplets: Items of one size.
        settings: Passed on to the pipeline.

    Yields:
        The item, its result (height, width, 3) in [0, 1], and the measures.
    """
    for triplet, result, reference in _edit(editor, triplets, settings):
        yield triplet, result, _score(triplet, result, reference)


def _edit(
    editor: Editor, triplets: list[Triplet], settings: dict[str, Any]
) -> Iterator[tuple[Triplet, Any, Any]]:
    output: Any = editor.pipeline(
        image=[Image.fromarray(t.source) for t in triplets],
        prompt=[t.instructions[_language(t)] for t in triplets],
        height=triplets[0].source.shape[0],
        width=triplets[0].source.shape[1],
        generator=[torch.Generator().manual_seed(t.seed % 2**32) for t in triplets],
        output_type="np",
        return_references=True,
        **settings,
    )
    yield from zip(triplets, output.images, output.references, strict=True)


def _language(triplet: Triplet) -> str:
    return ("en", "zh")[triplet.seed % 2]


def _score(triplet: Triplet, result: np.ndarray, reference: np.ndarray) -> ItemScore:
    source, target = triplet.source / 255, triplet.target / 255
    inside, outside = triplet.mask, ~triplet.mask
    gain = 1 - _mse(result, target, inside) / _mse(source, target, inside)
    psnr_outside = psnr_outside_vae = kept = kept_with_mask = None
    if outside.mean() >= LEAST_OUTSIDE:
        psnr_outside = _psnr(result, source, outside)
        psnr_outside_vae = _psnr(reference, source, outside)
        picture = images.open_picture(Image.fromarray(triplet.source))
        kept, kept_with_mask = (
            float((np.asarray(restored) == triplet.source).all(-1)[outside].mean())
            for restored in (
                images.restore(picture, reference, result, keep="auto"),
                images.restore(
                    picture,
                    reference,
                    result,
                    keep="auto",
                    mask=Image.fromarray(np.uint8(255) * inside),
                ),
            )
        )
    language = _language(triplet)
    return ItemScore(
        triplet.category,
        triplet.seed,
        language,
        triplet.instructions[language],
        float(gain),
        psnr_outside,
        psnr_outside_vae,
        kept,
        kept_with_mask,
    )


def _psnr(a: np.ndarray, b: np.ndarray, where: np.ndarray) -> float:
    """In dB, of values in [0, 1]; equal pictures count as 100 dB."""
    return float(-10 * np.log10(max(_mse(a, b, where), 1e-10)))


def _mse(a: np.ndarray, b: np.ndarray, where: np.ndarray) -> float:
    return float(np.square(a[where] - b[where]).mean())


def mean_score(category: str, scores: Sequence[ItemScore]) -> CategoryScore:
    """The means over the items of one category."""
    items = [score for score in scores if score.category == category]
    gains = np.asarray([item.gain for item in items])

    def mean(name: str) -> float:
        values = [getattr(item, name) for item in items if getattr(item, name) is not None]
        return float(np.mean(values)) if values else float("nan")

    return CategoryScore(
        category,
        len(items),
        float(gains.mean()),
        float(np.median(gains)),
        float((gains >= SUCCESS_GAIN).mean()),
        mean("psnr_outside"),
        mean("psnr_outside_vae"),
        mean("kept"),
        mean("kept_with_mask"),
    )


def as_json(scores: Sequence[ItemScore | CategoryScore], indent: int | None = None) -> str:
    """The scores as a JSON list; null for what an item has not."""
    rows = [
        {name: None if value != value else value for name, value in asdict(score).items()}
        for score in scores
    ]
    return json.dumps(rows, ensure_ascii=False, indent=indent)


def markdown(scores: Sequence[CategoryScore]) -> str:
    """The table as Markdown, with the means of several categories below."""
    head = (
        "| category | items | gain | median gain | success | PSNR outside | of the autoencoder "
        "| kept | kept, mask given |",
        "|---|---|---|---|---|---|---|---|---|",
    )
    rows = (
        f"| {s.category} | {s.items} | {s.gain:.2f} | {s.median_gain:.2f} | {s.success:.0%} "
        f"| {_cell(s.psnr_outside, '.1f', ' dB')} | {_cell(s.psnr_outside_vae, '.1f', ' dB')} "
        f"| {_cell(s.kept, '.1%')} | {_cell(s.kept_with_mask, '.1%')} |"
        for s in (*scores, *([_mean(scores)] if len(scores) > 1 else []))
    )
    return "\n".join((*head, *rows))


def _mean(scores: Sequence[CategoryScore]) -> CategoryScore:
    """Each category counts the same; those without an outside are left out there."""

    def mean(name: str) -> float:
        values = np.asarray([getattr(score, name) for score in scores])
        known = values[~np.isnan(values)]
        return float(known.mean()) if len(known) else float("nan")

    names = (field.name for field in fields(CategoryScore) if field.type is float)
    items = sum(score.items for score in scores)
    return CategoryScore("mean", items, **{name: mean(name) for name in names})


def _cell(value: float, form: str, unit: str = "") -> str:
    return "–" if np.isnan(value) else f"{value:{form}}{unit}"


def contact_sheet(
    rows: list[tuple[Triplet, np.ndarray, ItemScore]], columns: int = 4
) -> Image.Image:
    """Source, result and target of each item side by side, its gain and instruction below."""
    height, width = rows[0][0].source.shape[:2]
    cell_width, cell_height = 3 * width + 8, height + 14
    sheet = Image.new(
        "RGB", (columns * cell_width, -(-len(rows) // columns) * cell_height), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for i, (triplet, result, score) in enumerate(rows):
        left, top = i % columns * cell_width, i // columns * cell_height
        pictures = (triplet.source, (result.clip(0, 1) * 255).astype(np.uint8), triplet.target)
        for j, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (left + j * width, top))
        _write(draw, left, top + height, f"{score.gain:.2f} {score.instruction}")
    return sheet


def _write(draw: ImageDraw.ImageDraw, left: float, top: int, text: str) -> None:
    """Write English and Chinese in one line, each in a font that has its letters."""
    latin, chinese = _label_fonts()
    for part in re.findall(r"[ -~]+|[^ -~]+", text):
        font = latin if part.isascii() else chinese
        draw.text((left, top), part, fill="black", font=font)
        left += draw.textlength(part, font=font)


@lru_cache
def _label_fonts() -> tuple[Any, Any]:
    """Latin and Chinese."""
    return ImageFont.load_default(), ImageFont.truetype(font_path(Atlas(), "字"), LABEL_PX)
