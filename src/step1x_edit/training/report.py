"""What is left to read of a run: its loss curve, a page of its samples, and its card."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from step1x_edit.files import write_text
from step1x_edit.training.config import Sample
from step1x_edit.training.log import read_log

CURVE_NAME, CARD_NAME, PAGE_NAME = "loss.svg", "card.md", "samples.html"
WIDTH_PX, HEIGHT_PX, MARGIN_PX = 720, 240, 44
SMOOTHED_LINES = 10
STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem; }
td { padding: 0 .6rem .6rem 0; text-align: center; vertical-align: top; font-size: .9rem }
td img { width: 12rem; display: block } th { text-align: left }
"""


@dataclass(frozen=True)
class Card:
    """What a run says of itself at its end.

    Attributes:
        config: Its settings, as plain values.
        model_hash: Which weights it began with.
        version: Their release.
        num_parameters: That were trained.
        samples_seen: Examples, each counted as often as it was seen.
        num_examples: Each counted once.
        hashes: Dataset → hash of its content.
        files: The result, from the run's folder.
    """

    config: Mapping[str, Any]
    model_hash: str
    version: str
    num_parameters: int
    samples_seen: int
    num_examples: int
    hashes: Mapping[str, str]
    files: Sequence[Path]


def write_card(folder: Path, card: Card) -> Path:
    """Write ``card.md`` and ``loss.svg`` into a run's folder, and give the card's path back."""
    lines = read_log(folder)
    write_text(folder / CURVE_NAME, loss_curve([(line["step"], line["loss"]) for line in lines]))
    config = {name: value for name, value in card.config.items() if name != "data"}
    kind = "LoRA" if card.config["kind"] == "lora" else "Model"
    last = f"{lines[-1]['loss']:.4f}" if lines else "not logged"
    text = f"""# {folder.name}

{kind} trained from {card.config["model"]} ({card.version}, weights {card.model_hash}) with
step1x-edit {metadata.version("step1x-edit")}: {card.num_parameters:,} parameters,
{card.config["num_steps"]:,} steps, {card.samples_seen:,} samples of {card.num_examples:,} examples;
last loss {last}.

![loss]({CURVE_NAME})

## Result

{_bullets([f"`{path}`" for path in card.files])}

## Data

{_bullets([f"`{name}`: {digest}" for name, digest in card.hashes.items()])}

## Settings

```yaml
{yaml.safe_dump(config, sort_keys=False, allow_unicode=True).rstrip()}
data:
{_indented(yaml.safe_dump(card.config["data"], sort_keys=False, allow_unicode=True))}
```
"""
    return write_text(folder / CARD_NAME, text)


def loss_curve(points: Sequence[tuple[float, float]]) -> str:
    """An SVG of (step, loss): each line of the log in grey, a moving mean in blue."""
    if len(points) < 2:
        points = [*points, *points] or [(0, 0), (0, 0)]
    steps, losses = zip(*points, strict=True)
    means = [
        sum(part) / len(part)
        for end in range(1, len(losses) + 1)
        for part in [losses[max(0, end - SMOOTHED_LINES) : end]]
    ]
    low, high = min(losses), max(losses)

    def path(values: Sequence[float], colour: str, width: float) -> str:
        x = _scale(steps, steps[0], steps[-1], MARGIN_PX, WIDTH_PX - 8)
        y = _scale(values, low, high, HEIGHT_PX - MARGIN_PX, 8)
        where = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        return f'<polyline fill="none" stroke="{colour}" stroke-width="{width}" points="{where}"/>'

    bottom = HEIGHT_PX - MARGIN_PX
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH_PX}" height="{HEIGHT_PX}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        f"{path(losses, '#bbb', 1)}{path(means, '#3a6ea5', 2)}"
        f'<text x="4" y="16">{high:.3g}</text><text x="4" y="{bottom}">{low:.3g}</text>'
        f'<text x="{MARGIN_PX}" y="{HEIGHT_PX - 18}">step {steps[0]:g}</text>'
        f'<text x="{WIDTH_PX - 8}" y="{HEIGHT_PX - 18}" text-anchor="end">{steps[-1]:g}</text>'
        "</svg>\n"
    )


def _scale(
    values: Sequence[float], low: float, high: float, start: float, end: float
) -> list[float]:
    span = high - low or 1.0
    return [start + (value - low) / span * (end - start) for value in values]


def write_page(folder: Path, samples: Sequence[Sample]) -> Path:
    """Write the page of all samples made so far into a run's folder, and give its path back."""
    lines = read_log(folder)
    rows = []
    for number, sample in enumerate(samples):
        cells = "".join(
            f'<td><img src="samples/{path.name}" alt="">{int(path.stem.rpartition("_")[2])}'
            for path in sorted((folder / "samples").glob(f"{number:02d}_step_*.png"))
        )
        source = (
            "" if sample.image is None else f" <small>({html.escape(sample.image.name)})</small>"
        )
        rows.append(f'<tr><th colspan="99">{html.escape(sample.prompt)}{source}<tr>{cells}')
    curve = loss_curve([(line["step"], line["loss"]) for line in lines])
    title = html.escape(folder.name)
    return write_text(
        folder / PAGE_NAME,
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style><h1>{title}</h1>{curve}<table>{''.join(rows)}</table></html>\n",
    )


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.rstrip().splitlines())
