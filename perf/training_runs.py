"""Samples a second of whole training runs, data engine included: an earlier commit and this tree.

    python perf/training_runs.py --before bd993d1 --out perf/results/training_runs.md

Both train the shipped mini on the same data settings by ``python -m step1x_edit.training``, each
from its own sources, in turns; the first log line of a run, which holds the warm-up, is left out.
bd993d1 is the commit with the mini's first weights, by the loop that trained them, in batches of
32; today's recipe takes 64.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from statistics import median

import yaml

import machine
from step1x_edit.checkpoints.catalog import MINI_FOLDER

ROOT = Path(__file__).parents[1]
LINE = 20
"""Steps between two lines of the log."""
SHARES = {"tone": 0.2, "colour": 0.2, "removal": 0.2, "background": 0.2, "addition": 0.2}


def samples_per_s(sources: Path, batch_size: int, num_lines: int, preload: str = "") -> list[float]:
    """Speeds of one run, line by line of its log."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = {
            "kind": "edit", "folder": str(folder / "run"), "vae": str(MINI_FOLDER / "vae"),
            "processor": str(MINI_FOLDER / "processor"), "start": str(MINI_FOLDER),
            "num_steps": LINE * (num_lines + 1), "batch_size": batch_size,
            "data": {"shares": SHARES, "sizes": {"128x128": 1.0}},
        }  # fmt: skip
        (folder / "run.yaml").write_text(yaml.safe_dump(config))
        subprocess.run(
            [sys.executable, "-m", "step1x_edit.training", folder / "run.yaml"],
            env=os.environ | {"PYTHONPATH": str(sources / "src"), "LD_PRELOAD": preload},
            cwd=folder, check=True, capture_output=True,
        )  # fmt: skip
        lines = (folder / "run" / "log.jsonl").read_text().splitlines()
        return [json.loads(line)["samples_per_s"] for line in lines[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--before", required=True, help="commit")
    parser.add_argument("--before-batch", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--batch", type=int, nargs="+", default=[64])
    parser.add_argument("--lines", type=int, default=2, help=f"counted, of {LINE} steps each")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--preload", default="", help="library for today's runs: an allocator")
    parser.add_argument("--out", type=Path, help="write the table, as Markdown")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        earlier = Path(name) / "tree"
        subprocess.run(["git", "worktree", "add", "-q", earlier, args.before], cwd=ROOT, check=True)
        try:
            turns = [turn(earlier, args) for _ in range(args.turns)]
        finally:
            subprocess.run(["git", "worktree", "remove", "-f", earlier], cwd=ROOT, check=True)
    text = as_markdown(turns, args)
    print(text, end="")
    if args.out:
        args.out.write_text(text, encoding="utf-8")


def turn(earlier: Path, args: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Samples a second with each batch size: of the earlier loop, and of today's."""
    before = [median(samples_per_s(earlier, size, args.lines)) for size in args.before_batch]
    now = [median(samples_per_s(ROOT, size, args.lines, args.preload)) for size in args.batch]
    return before, now


def as_markdown(turns: list[tuple[list[float], list[float]]], args: argparse.Namespace) -> str:
    """Medians over the turns; a ratio is within a turn."""
    header = machine.describe() | ({"preload now": Path(args.preload).name} if args.preload else {})
    rows = [
        ", ".join(f"{name} {value}" for name, value in header.items()),
        "",
        f"| batch of {args.before} | samples/s | batch now | samples/s | ratio (each turn) |",
        "|---|---|---|---|---|",
    ]
    for (i, size), (j, own_size) in product(enumerate(args.before_batch), enumerate(args.batch)):
        pairs = [(before[i], now[j]) for before, now in turns]
        ratios = [now / before for before, now in pairs]
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        before, now = (median(speeds) for speeds in zip(*pairs, strict=True))
        rows.append(
            f"| {size} | {before:.1f} | {own_size} | {now:.1f} | {median(ratios):.2f} ({each}) |"
        )
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
