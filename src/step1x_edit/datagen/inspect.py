"""One HTML page that shows what a dataset is like: shares, histograms and samples of each category.

The page holds its pictures, so it can be sent and opened anywhere. Called by ``step1x data
inspect``.
"""

import base64
import html
import io
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from step1x_edit.datagen.generate import shard_paths
from step1x_edit.datagen.records import Triplet
from step1x_edit.datagen.shards import read
from step1x_edit.files import write_text

SHOWN_SIDE_PX = 160
NUM_BINS = 20
MASK_RED = (230, 40, 40)
STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem }
table { border-collapse: collapse } td, th { padding: .15rem .8rem .15rem 0; text-align: left }
td.n { text-align: right } .bar { background: #3a6ea5; height: .8rem }
.bins { align-items: end; display: flex; gap: 2px; height: 5rem; margin-bottom: .2rem }
.bins div { background: #3a6ea5; width: 1.4rem }
.items { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(31rem, 1fr)) }
figure { margin: 0 } figure img { width: 10rem } figcaption { font-size: .9rem }
"""


class _Statistics:
    """What the page counts while the shards go by."""

    def __init__(self, items: int) -> None:
        self.items = items
        self.categories: Counter[str] = Counter()
        self.sizes: Counter[str] = Counter()
        self.instructions: dict[str, set[str]] = defaultdict(set)
        self.changed: list[float] = []
        self.lengths: list[int] = []
        self.shown: dict[str, list[Triplet]] = defaultdict(list)

    def add(self, triplet: Triplet) -> None:
        """Count one record; the first ones of each category are shown."""
        self.categories[triplet.category] += 1
        height, width = triplet.mask.shape
        self.sizes[f"{width}x{height}"] += 1
        self.changed.append(float(triplet.mask.mean()))
        self.lengths.append(len(triplet.instructions["en"].split()))
        for language, words in triplet.instructions.items():
            self.instructions[language].add(words)
        if len(self.shown[triplet.category]) < self.items:
            self.shown[triplet.category].append(triplet)


def write_page(
    folder: Path,
    out: Path,
    items: int = 24,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Read every shard of a dataset and write its page.

    Args:
        folder: The dataset.
        out: The page.
        items: Records shown of each category.
        on_progress: Called with the shards read and the shards in all.

    Raises:
        InvalidRequest: There are no shards, or one is damaged.
    """
    statistics = _Statistics(items)
    paths = shard_paths(folder)
    for number, path in enumerate(paths, 1):
        for triplet in read(path):
            statistics.add(triplet)
        if on_progress is not None:
            on_progress(number, len(paths))
    return write_text(out, _page(folder.name, statistics))


def _page(name: str, statistics: _Statistics) -> str:
    total = statistics.categories.total()
    distinct = ", ".join(f"{len(words)} {lang}" for lang, words in statistics.instructions.items())
    sections = [
        f"<h1>{html.escape(name)}</h1><p>{total} records, distinct instructions: {distinct}</p>",
        "<h2>Categories</h2>" + _shares(statistics.categories),
        "<h2>Sizes</h2>" + _shares(statistics.sizes),
        "<h2>Changed share of the picture, %</h2>" + _histogram(100 * np.array(statistics.changed)),
        "<h2>Words of the English instruction</h2>" + _histogram(np.array(statistics.lengths)),
        *(_samples(category, shown) for category, shown in sorted(statistics.shown.items())),
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(name)}</title>'
        f"<style>{STYLE}</style><body>{''.join(sections)}</body></html>\n"
    )


def _shares(counts: Counter[str]) -> str:
    total = counts.total()
    rows = "".join(
        f'<tr><td>{html.escape(name)}<td class="n">{count}<td class="n">{count / total:.1%}'
        f'<td><div class="bar" style="width: {30 * count / total:.2f}rem"></div>'
        for name, count in counts.most_common()
    )
    return f"<table>{rows}</table>"


def _histogram(values: np.ndarray) -> str:
    counts, edges = np.histogram(values, bins=NUM_BINS)
    bars = "".join(
        f'<div style="height: {100 * count / max(counts.max(), 1):.1f}%" '
        f'title="{low:.3g} to {high:.3g}: {count}"></div>'
        for count, low, high in zip(counts, edges, edges[1:], strict=False)
    )
    middle = f"median {np.median(values):.3g}"
    return f'<div class="bins">{bars}</div><p>{edges[0]:.3g} to {edges[-1]:.3g}, {middle}</p>'


def _samples(category: str, triplets: Iterable[Triplet]) -> str:
    figures = "".join(
        f"<figure>{_sheet(triplet)}<figcaption>{html.escape(triplet.instructions['en'])}<br>"
        f"{html.escape(triplet.instructions['zh'])}<br><small>{triplet.key}</small></figcaption>"
        "</figure>"
        for triplet in triplets
    )
    return f'<h2>{html.escape(category)}</h2><div class="items">{figures}</div>'


def _sheet(triplet: Triplet) -> str:
    marked = triplet.source // 3
    marked[triplet.mask] = MASK_RED
    return " ".join(map(_embedded, (triplet.source, triplet.target, marked)))


def _embedded(pixels: np.ndarray) -> str:
    picture = Image.fromarray(pixels)
    picture.thumbnail((SHOWN_SIDE_PX, SHOWN_SIDE_PX))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" src="data:image/webp;base64,{data}">'
