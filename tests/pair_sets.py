"""Small datasets of pairs on disk, as people have them."""

from __future__ import annotations

import json
from pathlib import Path

from .pictures import as_image, detailed

SENTENCES = ("make it darker", "add a red ball", 'write "HI" on it', "remove the dog")


def write_pictures(folder: Path, sizes: list[tuple[int, int]]) -> list[tuple[Path, Path]]:
    """A target and a source of each size, named by their numbers."""
    pairs = []
    for number, size in enumerate(sizes):
        pair = tuple(folder / part / f"{number}.png" for part in ("target", "source"))
        for place, path in enumerate(pair):
            path.parent.mkdir(parents=True, exist_ok=True)
            as_image(detailed(*size, seed=2 * number + place)).save(path)
        pairs.append(pair)
    return pairs


def write_metadata(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    """A dataset as `step1x data export` writes it; gives back the metadata file."""
    entries = {
        str(target): {"ref_image_path": str(source), "caption": SENTENCES[number % 4]}
        for number, (target, source) in enumerate(write_pictures(folder, sizes))
    }
    path = folder / "metadata.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


OFFICIAL_TOML = """\
[general]
shuffle_caption = false
caption_extension = '.txt'
keep_tokens = 1

# This is a edit dataset
[[datasets]]
resolution = [{side}, {side}]
batch_size = 1
edit_dataset = true # necessary for editing tasks

  [[datasets.subsets]]
  image_dir = '{folder}'
  metadata_file = '{metadata}'
"""
"""The form of the released trainer's example."""


def write_official(folder: Path, sizes: list[tuple[int, int]], side: int = 64) -> Path:
    """The released trainer's TOML with its metadata JSON; gives back the TOML."""
    metadata = write_metadata(folder, sizes)
    path = folder / "step1x_edit.toml"
    text = OFFICIAL_TOML.format(side=side, folder=folder, metadata=metadata)
    path.write_text(text, encoding="utf-8")
    return path
