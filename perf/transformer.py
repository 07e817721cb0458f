"""Speed of the transformer against diffusers' FLUX of equal sizes, in one run.

    python perf/transformer.py --dtype autocast --out perf/results/transformer.md

Both networks take turns (ours, connector alone, FLUX, a plain matrix product, ours, ...), so that
whatever else the machine does falls on all of them; the table holds medians over the turns of the
ratio within a turn. FLUX has no connector: "trunk" is ours less the time of the connector alone.
The last column is our rate of multiply-adds over that of one large matrix product in the same
dtype on the same machine.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import machine
from step1x_edit.model.guidance import prepare_ids
from step1x_edit.model.transformer import Step1XEditTransformer2DModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "autocast": torch.float32}
MATRIX_SIDE = 2048


class Contest:
    """Both networks with one set of inputs."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        trunk = {
            "num_layers": args.double,
            "num_single_layers": args.single,
            "attention_head_dim": args.head_dim,
            "num_attention_heads": args.heads,
            "joint_attention_dim": args.context,
            "axes_dims_rope": axes_dims(args.head_dim),
        }
        dtype = DTYPES[args.dtype]
        self.ours = Step1XEditTransformer2DModel(
            **trunk,
            connector_in_channels=args.context,
            connector_hidden_size=args.context,
            connector_heads_num=args.connector_heads,
        )
        self.flux = FluxTransformer2DModel(**trunk)
        for model in (self.ours, self.flux):
            nn.Module.to(model, dtype)
        self.autocast = args.dtype == "autocast"

        img_ids, txt_ids = prepare_ids(args.text, (args.rows, args.rows), (args.rows, args.rows))
        tokens = torch.randn(args.batch, len(img_ids), 64, dtype=dtype)
        features = torch.randn(args.batch, args.text, args.context, dtype=dtype)
        mask = torch.ones(args.batch, args.text, dtype=torch.long)
        pooled = torch.randn(args.batch, 768, dtype=dtype)
        times = torch.rand(args.batch)
        self.num_tokens = len(img_ids) + args.text
        self.forwards: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
            "ours": (
                self.ours,
                lambda: self.ours(tokens, features, mask, times, img_ids, txt_ids).sample,
            ),
            "connector": (
                self.ours.connector,
                lambda: torch.cat(
                    [part.flatten(1) for part in self.ours.connector(features, times, mask)], dim=1
                ),
            ),
            "flux": (
                self.flux,
                lambda: self.flux(tokens, features, pooled, times, img_ids, txt_ids).sample,
            ),
        }
        matrix_dtype = torch.bfloat16 if self.autocast else dtype
        self.matrix = torch.randn(MATRIX_SIDE, MATRIX_SIDE, dtype=matrix_dtype)

    def run(self, name: str, train: bool) -> None:
        """One forward pass, or one forward and backward pass."""
        module, forward = self.forwards[name]
        precision: AbstractContextManager[Any] = (
            torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext()
        )
        with torch.set_grad_enabled(train), precision:
            output = forward()
        if train:
            output.float().square().mean().backward()
            module.zero_grad()

    def turns(self, train: bool, repeats: int) -> list[dict[str, float]]:
        """Seconds of each contestant in each turn; the first, unmeasured turn warms up."""
        contestants: dict[str, Callable[[], object]] = {
            name: lambda name=name: self.run(name, train) for name in self.forwards
        }
        contestants["matrix"] = lambda: self.matrix @ self.matrix
        for run in contestants.values():
            run()
        return [{name: seconds(run) for name, run in contestants.items()} for _ in range(repeats)]

    def flops(self, train: bool) -> int:
        """Multiply-adds times two of ours, counted by torch with attention written out."""
        written_out = attention_backend(AttentionBackendName._NATIVE_MATH)
        with written_out, FlopCounterMode(display=False) as counter:
            self.run("ours", train)
        return counter.get_total_flops()


def axes_dims(head_dim: int) -> tuple[int, int, int]:
    """Head channels per position axis, in about FLUX's proportion, each even."""
    side = head_dim * 7 // 16 // 2 * 2
    return head_dim - 2 * side, side, side


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock time of `run`."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(contest: Contest, train: bool, repeats: int) -> dict[str, float]:
    """One row of the table."""
    turns = contest.turns(train, repeats)
    rate = contest.flops(train) / median(turn["ours"] for turn in turns)
    matrix_rate = 2 * MATRIX_SIDE**3 / median(turn["matrix"] for turn in turns)
    return {
        "ours_s": median(turn["ours"] for turn in turns),
        "flux_s": median(turn["flux"] for turn in turns),
        "ratio_with_connector": median(turn["ours"] / turn["flux"] for turn in turns),
        "ratio_trunk": median((turn["ours"] - turn["connector"]) / turn["flux"] for turn in turns),
        "machine_tflops": matrix_rate / 1e12,
        "fraction_of_machine": rate / matrix_rate,
    }


def describe(args: argparse.Namespace, contest: Contest) -> dict[str, Any]:
    """What was measured, where and with which code."""
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    return {
        **machine.describe(),
        **settings,
        "tokens": contest.num_tokens,
        "parameters": sum(parameter.numel() for parameter in contest.ours.parameters()),
        "threads": torch.get_num_threads(),
    }


def as_markdown(about: dict[str, Any], rows: dict[str, dict[str, float]]) -> str:
    """The table, under a line that says what was measured."""
    lines = [
        ", ".join(f"{name} {value}" for name, value in about.items()),
        "",
        "| pass | ours s | FLUX s | ours / FLUX | trunk / FLUX | of matrix rate |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['ours_s']:.3f} | {row['flux_s']:.3f} "
            f"| {row['ratio_with_connector']:.2f} | {row['ratio_trunk']:.2f} "
            f"| {row['fraction_of_machine']:.0%} of {row['machine_tflops']:.2f} TFLOP/s |"
        )
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dtype", choices=DTYPES, default="autocast")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rows", type=int, default=8, help="token rows and columns of a picture")
    parser.add_argument("--text", type=int, default=40, help="text tokens")
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--double", type=int, default=2, help="double-stream blocks")
    parser.add_argument("--single", type=int, default=4, help="single-stream blocks")
    parser.add_argument("--context", type=int, default=256, help="width of text features")
    parser.add_argument("--connector-heads", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--out", type=Path, help="write the result: .json or .md")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    contest = Contest(args)
    rows = {
        name: measure(contest, train, args.repeats)
        for name, train in (("forward", False), ("training step", True))
    }
    about = describe(args, contest)
    table = as_markdown(about, rows)
    print(table, end="")
    if args.out:
        is_json = args.out.suffix == ".json"
        text = json.dumps({"about": about, "rows": rows}, indent=2) + "\n" if is_json else table
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
