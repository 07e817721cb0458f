"""Speed of the mini's training step against the machine's matrix rate and against plain loops.

    python perf/training.py --out perf/results/training.md

Everything takes turns in one process (a large bfloat16 matrix product, a plain loop, version 0's
loop, today's, the product again, ...), so that whatever else the machine does falls on all of them;
the table holds medians over the turns of ratios within a turn, by the clock and by processor time.
A step is loss, gradient, clipping and update, without the data engine. Three loops over the shipped
mini and the same batches:

- plain: bfloat16 autocast and AdamW, transformers' and diffusers' modules as they come;
- version 0: the loop of the first weights: Muon, one batched vision tower, written-out attention of
  the language model, exact GELU, channels-last autoencoder;
- now: the blocks of `quick_blocks` and the convolutions of `quick_encoder` besides, the parts of a
  batch in `lanes` where there are two cores.

Freed memory is kept for all three. "Of the matrix rate" counts a step as 6 x parameters x tokens
(transformer and connector; padding, target and reference tokens); "multiplied" counts what version
0's loss and gradient really multiply, for all three.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from diffusers import AutoencoderDC
from diffusers.models.activations import GELU
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import machine
from step1x_edit.checkpoints.catalog import MINI_FOLDER
from step1x_edit.model.instruction import InstructionEncoder, load_text_encoder
from step1x_edit.runtime.heap import keep_freed_memory
from step1x_edit.training.config import DataSettings, EditRun
from step1x_edit.training.dataset import EditBatch, EditCollate, TripletBatches
from step1x_edit.training.lanes import Lanes
from step1x_edit.training.trainer import EditTraining, optimizers_of

MATRIX_SIDE = 2048
PRODUCT_FLOPS = 8 * 2 * MATRIX_SIDE**3
CLIP_NORM = 1.0


class Loop:
    """Networks with their optimisers."""

    def __init__(self, config: EditRun, kind: str) -> None:
        self.training = EditTraining(config)
        if kind != "now" and self.training.quick is not None:
            self.training.quick.remove()
            self.training.quick = None
            self.training.vae = read_vae()
        if kind == "plain":
            self._undo_the_rest()
        self.lanes = Lanes(config.parts) if kind == "now" else None
        self.parameters = list(self.training.trained.parameters())
        self.optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(self.parameters)]
        if kind != "plain":
            self.optimizers, _ = optimizers_of(self.training.trained, config.lr, 1.0)

    def _undo_the_rest(self) -> None:
        training = self.training
        for module in training.transformer.modules():
            if isinstance(module, nn.GELU | GELU):
                module.approximate = "tanh"
        stock = load_text_encoder(MINI_FOLDER / "text_encoder", dtype=torch.float32)
        old = training.encoder
        training.encoder = InstructionEncoder(stock, old.tokenizer.processor, old.config)
        training.trained["text_encoder"] = stock
        nn.Module.to(training.vae, memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue] - stubs lack it

    def gradient(self, batch: EditBatch) -> float:
        """The loss; gradients stay in the parameters."""
        if self.lanes is not None:
            return self.lanes.gradient(self.training.loss_of, batch, self.parameters)[0]
        loss, _ = self.training.loss_of(batch)
        loss.backward()
        return loss.item()

    def step(self, batch: EditBatch) -> float:
        """One step at a learning rate of nothing, so that all loops stay where they are."""
        loss = self.gradient(batch)
        nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            if self.lanes is None:
                optimizer.step()
            else:
                self.lanes.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        return loss


def read_vae() -> AutoencoderDC:
    """The autoencoder as it comes, but for its layout in memory."""
    vae = AutoencoderDC.from_pretrained(MINI_FOLDER / "vae").requires_grad_(False).eval()
    nn.Module.to(vae, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - stubs lack it
    return vae


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock, and of processor time."""
    clock, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - clock, time.process_time() - processor


def draw(training: EditTraining, batch_size: int, count: int) -> list[EditBatch]:
    """Batches of one picture size."""
    collate = EditCollate(training.encoder.tokenizer, 0.0, 0.35, 0.0)
    data = DataSettings(sizes={"128x128": 1.0}, num_workers=0)
    stream = iter(TripletBatches(data, batch_size, collate))
    return [next(stream) for _ in range(count)]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch", type=int, nargs="+", default=[32], help="sizes")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--out", type=Path, help="write the table, as Markdown")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        config = EditRun.model_validate(
            {
                "kind": "edit", "folder": folder, "vae": MINI_FOLDER / "vae", "num_steps": 1,
                "processor": MINI_FOLDER / "processor", "start": MINI_FOLDER,
                "time_shift": [3.0, 60.0],
            }
        )  # fmt: skip
        loops = {kind: Loop(config, kind) for kind in ("plain", "version 0", "now")}
    header = ", ".join(
        f"{name} {value}"
        for name, value in {
            **machine.describe(), "threads": torch.get_num_threads(), "turns": args.turns,
        }.items()
    )  # fmt: skip
    table = "\n".join([header, *(measure(loops, size, args.turns) for size in args.batch)])
    print(table, end="")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        before = args.out.read_text(encoding="utf-8") if args.out.exists() else ""
        _, heading, notes = before.partition("\n## ")  # written by hand; they stay
        args.out.write_text(table + heading + notes, encoding="utf-8")


def measure(loops: dict[str, Loop], batch_size: int, num_turns: int) -> str:
    """The table of one batch size."""
    batches = draw(loops["now"].training, batch_size, 3)
    losses: dict[str, float] = {}
    for kind, loop in loops.items():  # also warms up
        torch.manual_seed(0)
        losses[kind] = loop.step(batches[0])
    with FlopCounterMode(display=False) as counter:
        loops["version 0"].gradient(batches[0])
    loops["version 0"].training.trained.zero_grad(set_to_none=True)

    matrix = torch.randn(MATRIX_SIDE, MATRIX_SIDE, dtype=torch.bfloat16)
    turns: list[Turn] = []
    for number in range(num_turns + 1):
        batch = batches[number % len(batches)]
        turn = Turn()
        for kind, loop in loops.items():
            turn.products.append(timed(lambda: [matrix @ matrix for _ in range(8)]))
            turn.steps[kind] = timed(lambda loop=loop, batch=batch: loop.step(batch))
        turn.products.append(timed(lambda: [matrix @ matrix for _ in range(8)]))
        turns.append(turn)

    transformer = loops["now"].training.transformer
    num_parameters = sum(parameter.numel() for parameter in transformer.parameters())
    text = loops["now"].training.encoder.config.max_length
    tokens = batch_size * (text + batches[0].labels.shape[1])
    title = f"Batch {batch_size}: {num_parameters} parameters, {tokens} tokens."
    flops = (6 * num_parameters * tokens, counter.get_total_flops())
    return f"\n{title} {as_markdown(turns[1:], losses, *flops)}"


@dataclass
class Turn:
    """Seconds by the clock and of processor time."""

    steps: dict[str, tuple[float, float]] = field(default_factory=dict)
    products: list[tuple[float, float]] = field(default_factory=list)
    """Eight matrix products before each step, and after the last."""

    def of_matrix(self, kind: str, flops: int, which: int) -> float:
        """A step's rate over that of the products around it."""
        place = list(self.steps).index(kind)
        around = (self.products[place][which] + self.products[place + 1][which]) / 2
        return flops / self.steps[kind][which] / (PRODUCT_FLOPS / around)


def as_markdown(
    turns: list[Turn], losses: dict[str, float], model_flops: int, counted_flops: int
) -> str:
    """The table, under a line that says what was counted."""
    rates = [PRODUCT_FLOPS / product[1] / 1e12 for turn in turns for product in turn.products]
    lines = [
        f"Matrix product: {median(rates):.2f} TFLOP per second of processor time "
        f"({min(rates):.2f} to {max(rates):.2f}). A step: "
        f"{model_flops / 1e12:.3f} TFLOP as 6 x parameters x tokens, {counted_flops / 1e12:.3f} "
        "multiplied by version 0's.",
        "",
        "| loop | loss | clock s | processor s | speed beside plain: processor time | clock "
        "| beside version 0: processor time | clock "
        "| of the matrix rate: processor time | clock | multiplied |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, loss in losses.items():
        clock, processor = (median(turn.steps[kind][i] for turn in turns) for i in (0, 1))
        beside = [
            median(turn.steps[other][which] / turn.steps[kind][which] for turn in turns)
            for other in ("plain", "version 0")
            for which in (1, 0)
        ]
        shares = [
            median(turn.of_matrix(kind, flops, which) for turn in turns)
            for flops, which in ((model_flops, 1), (model_flops, 0), (counted_flops, 1))
        ]
        lines.append(
            f"| {kind} | {loss:.4f} | {clock:.2f} | {processor:.2f} | "
            + " | ".join(f"{ratio:.2f}" for ratio in (*beside, *shares))
            + " |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
