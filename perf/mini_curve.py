"""How well the mini edits after so many samples: every checkpoint that a run has kept, measured.

    python perf/mini_curve.py configs/train/mini_all.yaml --out perf/results/mini_curve.md

The run's averaged weights as they were, through ``step1x bench mini``: of each
category the share of held-out items whose gain is at least one half. Give the run `keep_every`, so
that there are some; the last rows are those of its newest checkpoints.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

import torch

import machine
from step1x_edit.training.config import EditRun, load
from step1x_edit.training.export import export


def measure(config: EditRun, checkpoint: Path, items: int, first: int) -> dict[str, float]:
    """Category -> share of its items that came out."""
    with tempfile.TemporaryDirectory() as name:
        alone = Path(name) / "run"  # an exporter takes the newest of a run
        (alone / "checkpoints").mkdir(parents=True)
        (alone / "checkpoints" / checkpoint.name).symlink_to(checkpoint.resolve())
        model = export(config.model_copy(update={"folder": alone}), Path(name) / "model")
        command = [Path(sys.executable).with_name("step1x"), "bench", "mini", "-q", "--json"]
        done = subprocess.run(
            [*command, "--model", model, "--items", str(items), "--first", str(first)],
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        return {row["category"]: row["success"] for row in json.loads(done.stdout)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("config", type=Path, help="YAML of a run of kind edit")
    parser.add_argument("--items", type=int, default=20, help="of each category")
    parser.add_argument("--first", type=int, default=0, help="number of the first item")
    parser.add_argument("--every", type=int, default=1, help="measure every so manyth checkpoint")
    parser.add_argument("--out", type=Path, help="write the table, as Markdown")
    args = parser.parse_args()
    config = load(args.config)
    if not isinstance(config, EditRun):
        parser.error(f"{args.config} is a run of kind {config.kind}, not edit")
    header = {**machine.describe(), "items of each category": args.items, "first": args.first}
    lines = [", ".join(f"{name} {value}" for name, value in header.items()), ""]
    checkpoints = sorted((config.folder / "checkpoints").glob("step_*.pt"))
    for checkpoint in checkpoints[:: -args.every][::-1]:
        seen = torch.load(checkpoint, weights_only=True, mmap=True)["samples_seen"]
        success = measure(config, checkpoint, args.items, args.first)
        if len(lines) == 2:
            names = ["samples", *success, "mean"]
            lines += [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        shares = [*success.values(), mean(success.values())]
        lines.append(f"| {seen:,} | {' | '.join(f'{share:.0%}' for share in shares)} |")
        print(lines[-1], flush=True)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
