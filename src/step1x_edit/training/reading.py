"""Teach the instruction encoder and the connector to read, before anything is drawn.

The velocity of a noisy picture says little about a sentence, so a text path that begins from
nothing is ignored for tens of thousands of pictures. Sentences alone cost next to nothing: here
linear heads learn to tell, from the connector's pooled vector and from the context token of the
last word, which edit is asked for and what each slot of the wording holds. The heads are thrown
away; the transformer then finds the words' meaning ready to use.
"""

import logging
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import IterableDataset

from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.operators import Context
from step1x_edit.datagen.pipeline import draw_edit, instructions_of, sample_category
from step1x_edit.errors import InvalidRequest
from step1x_edit.model.instruction import (
    InstructionEncoder,
    InstructionTokenizer,
    InstructionTokens,
)
from step1x_edit.model.processor import PictureProcessor
from step1x_edit.training.config import DataSettings, ReadingRun
from step1x_edit.training.dataset import in_worker
from step1x_edit.training.loop import Pace, TrainingRun, Watch, run_loop
from step1x_edit.training.mini import INSTRUCTION
from step1x_edit.training.slots import NUM_CLASSES, labels_of
from step1x_edit.training.trainer import begin_networks

logger = logging.getLogger(__name__)

DRAWN_PX = 32
"""Side of the scenes that the sentences are about, which nobody sees."""


def sample_sentence(
    rng: np.random.Generator, data: DataSettings, atlas: Atlas, language: str
) -> tuple[str, list[int]]:
    """A random instruction of the data engine, and its labels (see `slots`)."""
    context = Context(rng, atlas, data.variety)
    edit = draw_edit(context, sample_category(rng, data.shares), DRAWN_PX, DRAWN_PX)
    sentence = instructions_of(context, edit)[language]
    return sentence, labels_of(edit, sentence, language)


@dataclass(frozen=True)
class SentenceBatch:
    """What one step reads."""

    tokens: InstructionTokens
    labels: Int[Tensor, "batch slots"]
    """See `slots`."""


class SentenceBatches(IterableDataset[Any]):
    """Endless batches of tokenised sentences with their labels."""

    def __init__(self, run: ReadingRun, tokenize: InstructionTokenizer, first_batch: int) -> None:
        self.run, self.tokenize, self.number = run, tokenize, first_batch
        self.atlas = Atlas()

    def __iter__(self) -> Iterator[SentenceBatch]:
        """Yield batches for ever; batch number n is a function of (seed, n)."""
        while True:
            rng = np.random.default_rng([self.run.seed, self.number])
            rows = [self._sentence(rng) for _ in range(self.run.batch_size)]
            tokens = self.tokenize([None] * len(rows), [sentence for sentence, _ in rows])
            yield SentenceBatch(tokens, torch.tensor([labels for _, labels in rows]))
            self.number += 1

    def _sentence(self, rng: np.random.Generator) -> tuple[str, list[int]]:
        """One for which the model has room: of some compound ones it has not."""
        while True:
            language = "zh" if rng.random() < self.run.zh_share else "en"
            sentence, labels = sample_sentence(rng, self.run.data, self.atlas, language)
            try:
                self.tokenize([None], [sentence])
            except InvalidRequest:
                continue
            return sentence, labels


class ReadingTraining:
    """The networks of a run and the loss of a batch of sentences."""

    def __init__(self, config: ReadingRun) -> None:
        torch.manual_seed(config.seed)
        processor = PictureProcessor.from_pretrained(config.processor)
        self.transformer, text_encoder = begin_networks(config.start, processor)
        self.encoder = InstructionEncoder(text_encoder, processor, INSTRUCTION)
        self.bf16 = config.bf16
        settings = self.transformer.config
        self.heads = nn.ModuleList(
            nn.Linear(settings[width], sum(NUM_CLASSES))
            for width in ("vector_in_dim", "joint_attention_dim")
        )
        self.trained = nn.ModuleDict(
            {
                "connector": self.transformer.connector,
                "text_encoder": self.encoder.text_encoder,
                "heads": self.heads,
            }
        )

    def read(self, tokens: InstructionTokens) -> list[Float[Tensor, "batch classes"]]:
        """Both heads' logits."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            features = self.encoder.encode(tokens)
            times = torch.rand(len(features.features))
            context, pooled = self.transformer.connector(features.features, times, features.mask)
            last = context[torch.arange(len(context)), features.mask.sum(1) - 1]
            return [
                head(read).float() for head, read in zip(self.heads, (pooled, last), strict=True)
            ]

    def loss_of(self, batch: SentenceBatch) -> tuple[Tensor, int]:
        """Mean cross-entropy over heads and slots, and the number of sentences."""
        tokens, labels = batch.tokens, batch.labels
        losses = [
            cross_entropy(part, labels[:, slot])
            for logits in self.read(tokens)
            for slot, part in enumerate(logits.split(NUM_CLASSES, -1))
        ]
        return torch.stack(losses).mean(), len(labels)

    @torch.no_grad()
    def accuracy(self, batch: SentenceBatch) -> list[float]:
        """Share of sentences read right in all slots, from the pooled vector and the last word."""
        tokens, labels = batch.tokens, batch.labels
        return [
            float(
                torch.stack([part.argmax(-1) for part in logits.split(NUM_CLASSES, -1)], -1)
                .eq(labels).all(-1).float().mean()
            )
            for logits in self.read(tokens)
        ]  # fmt: skip


def train(config: ReadingRun, watch: Watch | None = None) -> signal.Signals | None:
    """Train, or go on training, and write the networks to the run's ``model`` folder.

    Args:
        config: The run.
        watch: Sees each step.

    Returns:
        The signal that stopped the run; None when it is complete.
    """
    training = ReadingTraining(config)
    optimizer = torch.optim.AdamW(
        training.trained.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=0.01
    )
    run = TrainingRun(
        config.folder, training.trained, [optimizer], config.lr, config.num_steps,
        decay_share=config.decay_share, keep_every=config.keep_every,
    )  # fmt: skip
    run.restore()
    stream = SentenceBatches(config, training.encoder.tokenizer, run.step)
    stopped = run_loop(
        run, in_worker(stream, 1), training.loss_of, pace=Pace.of(config), watch=watch
    )
    run.load_ema_into(training.trained)
    held_out = next(iter(SentenceBatches(config, training.encoder.tokenizer, 2**40)))
    pooled, last = training.accuracy(held_out)
    logger.info(
        "all slots right: %.3f from the pooled vector, %.3f from the last word", pooled, last
    )
    training.transformer.save_pretrained(config.folder / "model" / "transformer")
    training.encoder.text_encoder.save_pretrained(config.folder / "model" / "text_encoder")
    return stopped
