"""A LoRA teaches the mini an edit that it cannot do: an orange frame around the picture.

    python perf/lora.py [--config configs/train/lora.yaml] [--items 60] [--out perf/results/lora.md]

Makes 200 pairs with the data engine, trains with ``step1x train`` (a killed run goes on), and
measures edit gain and what stays on held-out pictures: without the LoRA, and with it in each of the
three layouts, whose pictures have to be identical. The frame is as wide as a token, its colour
and the sentences are always the same few.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from machine import describe
from step1x_edit import Editor, RuntimeConfig
from step1x_edit.benchmark import minibench
from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.pipeline import make_triplet, record_seed
from step1x_edit.datagen.records import Triplet
from step1x_edit.datagen.shards import write
from step1x_edit.datagen.variety import PLAIN
from step1x_edit.training.config import LoraRun, load
from step1x_edit.training.log import read_log

NUM_PAIRS = 200
FRAME_PX = 16
ORANGE = (250, 130, 20)
SENTENCES = (
    ("put an orange frame around the picture", "给照片加一个橙色的边框"),
    ("give it an orange border", "加上橙色的相框"),
)
SIZES = ((128, 128), (144, 96), (96, 144))
LAYOUTS = ("kohya", "peft", "comfyui")


def framed(seed: int, size: tuple[int, int], atlas: Atlas) -> Triplet:
    """A scene of the data engine as the source, the same with a frame as the target."""
    scene = make_triplet(seed, "colour", atlas, *size, PLAIN)
    mask = np.ones(scene.mask.shape, bool)
    mask[FRAME_PX:-FRAME_PX, FRAME_PX:-FRAME_PX] = False
    target = scene.source.copy()
    target[mask] = ORANGE
    english, chinese = SENTENCES[seed % len(SENTENCES)]
    words = {"en": english, "zh": chinese}
    return replace(scene, target=target, mask=mask, instructions=words, captions={})


def triplets(count: int, size: tuple[int, int], *, held_out: bool) -> Iterable[Triplet]:
    """So many of them, of seeds that training sees or of others."""
    atlas = Atlas()
    first = SIZES.index(size) * 1000
    for number in range(count):
        yield framed(record_seed(7, first + number, held_out=held_out), size, atlas)


def make_pairs(folder: Path) -> None:
    """The training data, a shard for each size."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(SIZES):
        path = folder / f"shard-{number:06d}.tar"
        share = NUM_PAIRS // len(SIZES) + (number < NUM_PAIRS % len(SIZES))
        if not path.exists():
            write(path, triplets(share, size, held_out=False))


def measure(
    items: list[Triplet], lora: Path | None
) -> tuple[minibench.CategoryScore, list[np.ndarray], Image.Image]:
    """Means, pictures and a contact sheet of held-out pictures edited with or without a LoRA."""
    chosen = [] if lora is None else [str(lora)]
    editor = Editor.load(runtime=RuntimeConfig.checked(lora=chosen))
    rows = list(minibench.measure(editor, items))
    score = minibench.mean_score(items[0].category, [row[-1] for row in rows])
    return score, [row[1] for row in rows], minibench.contact_sheet(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/train/lora.yaml"))
    parser.add_argument("--items", type=int, default=60)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    config = load(arguments.config)
    assert isinstance(config, LoraRun)
    make_pairs(config.folder / "pairs")

    started = time.monotonic()
    step1x = Path(sys.executable).parent / "step1x"
    subprocess.run([step1x, "train", arguments.config], check=True)
    minutes = (time.monotonic() - started) / 60

    items = list(triplets(arguments.items, SIZES[0], held_out=True))
    before, _, _ = measure(items, None)
    after = {name: measure(items, config.folder / f"lora_{name}.safetensors") for name in LAYOUTS}
    score, pictures, sheet = after["kohya"]
    sheet.save(config.folder / "held_out.png")
    same = all(
        np.array_equal(one, other)
        for _, others, _ in after.values()
        for one, other in zip(pictures, others, strict=True)
    )
    text = "\n".join(
        [
            f"# A LoRA over the mini: {NUM_PAIRS} pairs, {arguments.items} held-out pictures",
            "",
            *(f"- {name}: {value}" for name, value in describe().items()),
            f"- trained in {minutes:.1f} minutes (checks, features and loading included), "
            f"{config.num_steps} steps of {config.data.batch_size}, rank {config.rank}",
            f"- last loss {read_log(config.folder)[-1]['loss']:.4f}",
            f"- pictures of the three layouts identical: {'yes' if same else 'NO'}",
            "",
            "| | gain | median gain | success | PSNR outside | of the autoencoder |",
            "|---|---|---|---|---|---|",
            *(
                f"| {name} | {s.gain:.3f} | {s.median_gain:.3f} | {s.success:.0%} "
                f"| {s.psnr_outside:.1f} dB | {s.psnr_outside_vae:.1f} dB |"
                for name, s in (("without", before), ("with the LoRA", score))
            ),
            "",
        ]
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
