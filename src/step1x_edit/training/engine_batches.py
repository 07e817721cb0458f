"""Batches of examples straight from the data engine, which are new each time.

Autoencoder and language model run while training, by the pipeline's own functions. Called by
`feature_batches`.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from step1x_edit.datagen.config import StreamSettings
from step1x_edit.model.latents import PIXELS_PER_TOKEN
from step1x_edit.model.pipeline import Step1XEditPipeline
from step1x_edit.training import ranks
from step1x_edit.training.config import DataSettings
from step1x_edit.training.data_config import EnginePairs, PairData
from step1x_edit.training.dataset import EditBatch, EditCollate, TripletBatches, batches
from step1x_edit.training.feature_batch import FeatureBatch


class EngineBatches(Iterator[FeatureBatch]):
    """Batches of one data engine, encoded as they come.

    Args:
        settings: What to draw.
        share: Of the batches that no engine before took.
        batch_size: Examples of a batch.
        pipeline: Its networks are run.
        collate: Makes the sentences, in the worker.
        place: Of the first batch, among those that no engine before took.
    """

    def __init__(
        self,
        settings: EnginePairs,
        share: float,
        batch_size: int,
        pipeline: Step1XEditPipeline,
        collate: EditCollate,
        place: int,
    ) -> None:
        self.share, self.pipeline = share, pipeline
        drawn = {name: getattr(settings, name) for name in StreamSettings.model_fields}
        self._batches: Iterator[EditBatch] = batches(
            TripletBatches(
                DataSettings(num_workers=settings.num_workers, **drawn),
                batch_size,
                collate,
                first_batch=self.taken(place),
            )
        )

    def taken(self, place: int) -> int:
        """How many of the first `place` batches are this engine's: spread evenly."""
        return math.floor(place * self.share)

    def __next__(self) -> FeatureBatch:
        """Encode the next batch: every process draws it whole, and encodes its rows."""
        drawn = next(self._batches)
        own, share = ranks.own_rows(len(drawn.keys))
        encode, encoder = self.pipeline.encode_images, self.pipeline.instruction_encoder
        height, width = drawn.target.shape[1:3]
        with torch.no_grad():
            read = encoder.encode(drawn.instructions.rows(own))
        longest = int(drawn.instructions.lengths.max()) - encoder.config.num_dropped_tokens
        padding = max(0, longest - read.mask.shape[1])  # where the checkpoint does not pad
        return FeatureBatch(
            names=tuple(f"record {key} of the data engine" for key in drawn.keys),
            target=encode(_images(drawn.target[own])).cpu(),
            reference=None if drawn.source is None else encode(_images(drawn.source[own])).cpu(),
            grid=(height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN),
            features=pad(read.features, (0, 0, 0, padding)).cpu(),
            mask=pad(read.mask, (0, padding)).cpu(),
            changed=drawn.changed[own],
            first=own.start,
            share=share,
        )


def _images(pictures: Tensor) -> list[Image.Image]:
    return [Image.fromarray(picture.numpy()) for picture in pictures]


def engines_of(
    data: PairData, pipeline: Step1XEditPipeline, collate: EditCollate, first_batch: int
) -> list[EngineBatches]:
    """The engines, each with its share of what those before it leave."""
    engines: list[EngineBatches] = []
    left, place = 1.0, first_batch
    drawn = [dataset for dataset in data.datasets if isinstance(dataset, EnginePairs)]
    for dataset in drawn:
        # Where there is nothing else, the last one has the rest, whatever the sums round to.
        is_rest = dataset is drawn[-1] and len(drawn) == len(data.datasets)
        share = 1.0 if is_rest else dataset.share / left
        own = replace(collate, text_to_image_share=float(dataset.text_to_image))
        batch_size = dataset.batch_size or data.batch_size
        engines.append(EngineBatches(dataset, share, batch_size, pipeline, own, place))
        place -= engines[-1].taken(place)
        left -= dataset.share
    return engines
