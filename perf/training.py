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
- now: the blocks of `quick_blocks` and the convolutions of `quick_encoder` besides.

Freed memory is kept for all three. "Of the matrix rate" counts a step as 6 x parameters x tokens
(transformer and connector; padding, target and reference tokens); "multiplied" counts what version
0's step really multiplies.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
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
from step1x_edit.training.config import DataSettings, EditRun
from step1x_edit.training.dataset import EditBatch, EditCollate, TripletBatches
from step1x_edit.training.heap import keep_freed_memory
from step1x_edit.training.trainer import EditTraining, optimizers_of

MATRIX_SIDE = 2048
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
            optimizer.step()
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
    parser.add_argument("--batch", type=int, default=32)
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
    batches = draw(loops["now"].training, args.batch, 3)
    losses: dict[str, float] = {}
    for kind, loop in loops.items():  # also warms up
        torch.manual_seed(0)
        losses[kind] = loop.step(batches[0])
    with FlopCounterMode(display=False) as counter:
        loops["version 0"].gradient(batches[0])
    loops["version 0"].training.trained.zero_grad(set_to_none=True)

    matrix = torch.randn(MATRIX_SIDE, MATRIX_SIDE, dtype=torch.bfloat16)
    turns: list[dict[str, tuple[float, float]]] = []
    for number in range(args.turns + 1):
        batch = batches[number % len(batches)]
        turn = {"matrix": timed(lambda: [matrix @ matrix for _ in range(8)])}
        turn |= {
            kind: timed(lambda loop=loop, b=batch: loop.step(b)) for kind, loop in loops.items()
        }
        turns.append(turn)
    turns = turns[1:]

    transformer = loops["now"].training.transformer
    num_parameters = sum(parameter.numel() for parameter in transformer.parameters())
    text = loops["now"].training.encoder.config.max_length
    tokens = args.batch * (text + batches[0].labels.shape[1])
    about = {
        **machine.describe(), "threads": torch.get_num_threads(), "batch": args.batch,
        "turns": args.turns, "parameters": num_parameters, "tokens": tokens,
    }  # fmt: skip
    table = as_markdown(
        about, turns, losses, 6 * num_parameters * tokens, counter.get_total_flops()
    )
    print(table, end="")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        before = args.out.read_text(encoding="utf-8") if args.out.exists() else ""
        _, heading, notes = before.partition("\n## ")  # written by hand; they stay
        args.out.write_text(table + heading + notes, encoding="utf-8")


def as_markdown(
    about: dict[str, object],
    turns: list[dict[str, tuple[float, float]]],
    losses: dict[str, float],
    model_flops: int,
    counted_flops: int,
) -> str:
    """The table, under a line that says what was measured."""

    def of_matrix(kind: str, flops: int, which: int) -> float:
        product = 8 * 2 * MATRIX_SIDE**3
        rates = [flops / t[kind][which] / (product / t["matrix"][which]) for t in turns]
        return median(rates)

    rate = 8 * 2 * MATRIX_SIDE**3 / median(turn["matrix"][1] for turn in turns) / 1e12
    lines = [
        ", ".join(f"{name} {value}" for name, value in about.items()),
        "",
        f"Matrix product: {rate:.2f} TFLOP per second of processor time. A step: "
        f"{model_flops / 1e12:.3f} TFLOP as 6 x parameters x tokens, {counted_flops / 1e12:.3f} "
        "multiplied by version 0's.",
        "",
        "| loop | loss | clock s | processor s | speed beside plain | beside version 0 "
        "| of the matrix rate: processor time | clock | multiplied |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, loss in losses.items():
        clock, processor = (median(turn[kind][i] for turn in turns) for i in (0, 1))
        beside = [
            median(turn[other][1] / turn[kind][1] for turn in turns)
            for other in ("plain", "version 0")
        ]
        lines.append(
            f"| {kind} | {loss:.4f} | {clock:.2f} | {processor:.2f} | {beside[0]:.2f} "
            f"| {beside[1]:.2f} | {of_matrix(kind, model_flops, 1):.2f} "
            f"| {of_matrix(kind, model_flops, 0):.2f} | {of_matrix(kind, counted_flops, 1):.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
