"""Endless batches straight from the data engine's workers."""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.generate import shard_paths
from step1x_edit.datagen.pipeline import make_triplet, record_seed, sample_category
from step1x_edit.datagen.records import Triplet
from step1x_edit.datagen.shards import decode, read_parts
from step1x_edit.errors import InvalidRequest
from step1x_edit.model.instruction import InstructionTokenizer, InstructionTokens
from step1x_edit.training.alignment import changed_cells, token_labels
from step1x_edit.training.config import DataSettings

WORKER_NICENESS = 10
"""Added to a worker's: about a tenth of a core while the step has all of them busy."""

NUM_REDRAWN = 20
"""Batches without a sentence that the model can read, one after the other, that are no accident."""

Draw = Callable[[np.random.Generator, int, int, int], list[Triplet]]
"""Random source, number and size of a batch, and how often it was drawn before → its triplets."""
Collate = Callable[[list[Triplet], np.random.Generator], Any]


class TripletBatches(IterableDataset[Any]):
    """Batches of triplets of one size each, collated in the worker.

    Batch number n is a function of (seed, n) alone: the workers take turns, so their number changes
    only the speed.

    Args:
        settings: What to draw.
        batch_size: Triplets a batch.
        collate: Makes the batch; runs in the worker.
        first_batch: Where the stream begins (a resumed run goes on here).
        held_out: Draw from the seeds that training never sees.
    """

    def __init__(
        self,
        settings: DataSettings,
        batch_size: int,
        collate: Collate,
        *,
        first_batch: int = 0,
        held_out: bool = False,
    ) -> None:
        self.settings, self.batch_size, self.collate = settings, batch_size, collate
        self.first_batch, self.held_out = first_batch, held_out

    def __iter__(self) -> Iterator[Any]:
        """Yield collated batches for ever."""
        worker = get_worker_info()
        stride, number = (worker.num_workers, worker.id) if worker else (1, 0)
        if worker:
            torch.set_num_threads(1)
        draw = self._drawn if self.settings.shards is None else _Shelf(self.settings.shards).batch
        number += self.first_batch
        while True:
            yield self._collated(draw, number)
            number += stride

    def _collated(self, draw: Draw, number: int) -> Any:
        """Batch `number`; another one in its place where the model can read nothing of it."""
        seed = [self.settings.seed, number, int(self.held_out)]
        for attempt in count():
            rng = np.random.default_rng([*seed, attempt] if attempt else seed)
            triplets = draw(rng, number, self.batch_size, attempt)
            try:
                return self.collate(triplets, rng)
            except InvalidRequest:
                if attempt == NUM_REDRAWN:
                    raise

    def _drawn(
        self, rng: np.random.Generator, number: int, batch_size: int, attempt: int
    ) -> list[Triplet]:
        """Batch `number`, fresh from the engine; further attempts are of the streams after."""
        sizes = list(self.settings.sizes)
        weights = np.asarray([self.settings.sizes[size] for size in sizes])
        width, height = map(int, str(rng.choice(sizes, p=weights / weights.sum())).split("x"))
        first = number * batch_size
        seeds = [
            record_seed(self.settings.seed + attempt, first + i, held_out=self.held_out)
            for i in range(batch_size)
        ]
        return [
            make_triplet(
                seed,
                sample_category(rng, self.settings.shares),
                _atlas(),
                width,
                height,
                self.settings.variety,
            )
            for seed in seeds
        ]


class _Shelf:
    """Batches of a dataset's shards: each of one shard, and so of one size.

    Batch `number` is a function of (seed, number) alone; a shard is as likely as its file is large.
    """

    def __init__(self, folder: Path) -> None:
        self.paths = shard_paths(folder)
        sizes = np.asarray([path.stat().st_size for path in self.paths])
        self.shares = sizes / sizes.sum()
        self._open = lru_cache(maxsize=4)(lambda path: list(read_parts(path)))

    def batch(self, rng: np.random.Generator, _: int, batch_size: int, __: int) -> list[Triplet]:
        path = self.paths[rng.choice(len(self.paths), p=self.shares)]
        records = self._open(path)
        chosen = rng.choice(len(records), batch_size, replace=len(records) < batch_size)
        return [decode(records[i], path) for i in chosen]


def batches(stream: TripletBatches) -> Iterator[Any]:
    """Run a stream in the settings' number of worker processes."""
    num_workers = stream.settings.num_workers
    return in_worker(stream, num_workers) if num_workers else iter(stream)


def in_worker(stream: IterableDataset[Any], num_workers: int) -> Iterator[Any]:
    """Run a stream of whole batches in worker processes."""
    return iter(
        DataLoader(
            stream,
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=4,
            generator=torch.Generator(),  # else it draws from torch's own, which a run takes up
            worker_init_fn=_serve_the_trainer,
        )
    )


def _serve_the_trainer(_: int) -> None:
    """Leave signals and cores to the trainer.

    Ctrl-C reaches all processes of a terminal, and a worker must outlive the trainer's saving. A
    worker with the trainer's priority draws its batches in bursts that hold one of the step's cores
    up, while the others wait for that one; with less it fills the gaps.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(os, "nice"):  # not on Windows
        os.nice(WORKER_NICENESS)


@dataclass(frozen=True)
class EditBatch:
    """What one training step of the editor reads; all pictures of one size."""

    source: UInt8[Tensor, "batch height width 3"] | None
    """None for text to image."""
    target: UInt8[Tensor, "batch height width 3"]
    cells: Float[Tensor, "batch target_tokens cells"]
    """Share of each token's cells that the edit changes; 1 everywhere for text to image."""
    instructions: InstructionTokens
    labels: Int[Tensor, "batch tokens 5"]
    """See `alignment.token_labels`."""
    keys: tuple[str, ...]
    """Names of the records."""

    def __len__(self) -> int:
        return len(self.keys)

    def rows(self, chosen: slice) -> "EditBatch":
        """Some of the samples."""
        return EditBatch(
            source=None if self.source is None else self.source[chosen],
            target=self.target[chosen],
            cells=self.cells[chosen],
            instructions=self.instructions.rows(chosen),
            labels=self.labels[chosen],
            keys=self.keys[chosen],
        )

    @property
    def names(self) -> tuple[str, ...]:
        """What messages call the samples."""
        return tuple(f"record {key}" for key in self.keys)

    @property
    def changed(self) -> Float[Tensor, "batch target_tokens"]:
        """Share of each token's pixels that the edit changes."""
        return self.cells.mean(-1)


@dataclass(frozen=True)
class EditCollate:
    """Triplets → `EditBatch`, in the worker; picklable.

    Attributes:
        tokenize: Of the model that is trained.
        dropout: Share of the samples whose instruction is emptied, for classifier-free guidance.
        zh_share: Share of Chinese instructions.
        text_to_image_share: Share of the batches that draw the target from its caption alone.
    """

    tokenize: InstructionTokenizer
    dropout: float
    zh_share: float
    text_to_image_share: float

    def __call__(self, triplets: list[Triplet], rng: np.random.Generator) -> EditBatch:
        """Collate one batch."""
        captioned = [t for t in triplets if t.captions]
        drawing = rng.random() < self.text_to_image_share and len(captioned) > 0
        chosen = captioned if drawing else triplets
        words = [self._words(t.captions if drawing else t.instructions, rng) for t in chosen]
        pictures = [None if drawing else Image.fromarray(t.source) for t in chosen]
        try:
            instructions = self.tokenize(pictures, words)
        except InvalidRequest:
            # Of some compound sentences a small model has no room for all: without them.
            rows = [
                i for i, row in enumerate(zip(pictures, words, strict=True)) if self._fits(*row)
            ]
            if not rows:
                raise
            chosen = [chosen[i] for i in rows]
            instructions = self.tokenize([pictures[i] for i in rows], [words[i] for i in rows])
        labels = np.stack([token_labels(t, _atlas(), target_only=drawing) for t in chosen])
        masks = [np.ones_like(t.mask) if drawing else t.mask for t in chosen]
        cells = np.stack([changed_cells(mask) for mask in masks])
        return EditBatch(
            source=None if drawing else _stack([t.source for t in chosen]),
            target=_stack([t.target for t in chosen]),
            cells=torch.from_numpy(cells),
            instructions=instructions,
            labels=torch.from_numpy(labels),
            keys=tuple(t.key for t in chosen),
        )

    def _fits(self, picture: Image.Image | None, words: str) -> bool:
        try:
            self.tokenize([picture], [words])
        except InvalidRequest:
            return False
        return True

    def _words(self, by_language: dict[str, str], rng: np.random.Generator) -> str:
        words = by_language["zh" if rng.random() < self.zh_share else "en"]
        return "" if rng.random() < self.dropout else words


_atlas = lru_cache(Atlas)
"""One a process: its sprites are cached."""


def _stack(pictures: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pictures))


def picture_batches(
    settings: DataSettings, batch_size: int, *, first_batch: int = 0, held_out: bool = False
) -> Iterator[Tensor]:
    """Sources and targets of half as many triplets, (batch, 3, height, width) in [-1, 1]."""
    stream = TripletBatches(
        settings, batch_size // 2, _pictures, first_batch=first_batch, held_out=held_out
    )
    return batches(stream)


def _pictures(triplets: list[Triplet], _: np.random.Generator) -> Tensor:
    return to_unit(_stack([t.source for t in triplets] + [t.target for t in triplets]))


def to_unit(
    pictures: UInt8[Tensor, "batch height width 3"],
) -> Float[Tensor, "batch 3 height width"]:
    """Byte pictures → [-1, 1], channels first."""
    return pictures.movedim(-1, 1).float().div_(127.5).sub_(1)
