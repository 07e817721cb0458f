"""Small runs over tiny models, for tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

CAPTION = "invert the colours"


def write_pairs(folder: Path, count: int = 5, size: tuple[int, int] = (96, 64)) -> Path:
    """Noise and its negative, as a folder of pairs; gives the folder back."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for number in range(count):
        source = draw.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(source).save(folder / f"{number}.source.png")
        Image.fromarray(255 - source).save(folder / f"{number}.target.png")
        (folder / f"{number}.txt").write_text(CAPTION, encoding="utf-8")
    return folder


def settings(folder: Path, model: Path | str, **changes: Any) -> dict[str, Any]:
    """A LoRA run of 40 steps in `folder`, its pairs and its cache beside it.

    A change to None leaves a setting out.
    """
    pairs = folder.parent / "pairs"
    if not pairs.exists():
        write_pairs(pairs)
    values = {
        "kind": "lora",
        "folder": str(folder),
        "model": str(model),
        "rank": 2,
        "alpha": 1,
        "num_steps": 40,
        "lr": 1e-2,
        "zh_share": 0.0,
        "report_every": 5,
        "tensorboard": False,
        "data": {
            "datasets": [{"kind": "folder", "folder": str(pairs)}],
            "size_level_px": 64,
            "batch_size": 2,
            "cache": str(folder.parent / "cache"),
        },
    } | changes
    return {name: value for name, value in values.items() if value is not None}


def write_config(path: Path, values: dict[str, Any]) -> Path:
    """Write a run's YAML, and give its path back."""
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path
