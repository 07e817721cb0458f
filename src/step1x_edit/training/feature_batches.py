"""Batches of latents and instruction features: from checked datasets to what a step reads.

The frozen networks run once an example, before the first step; what they say is kept
(`feature_cache`), and the batches are read from there, without them. Only examples straight from
the data engine, which are new each time, are encoded while training. The networks run as in the
pipeline, by its own functions, so that training reads what editing reads.
"""

import logging
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from step1x_edit.errors import InvalidRequest
from step1x_edit.model.latents import PIXELS_PER_TOKEN
from step1x_edit.model.pipeline import Step1XEditPipeline
from step1x_edit.training import ranks
from step1x_edit.training.alignment import squares
from step1x_edit.training.data_config import EnginePairs, PairData, ShardPairs, StoredPairs
from step1x_edit.training.dataset import EditCollate
from step1x_edit.training.engine_batches import engines_of
from step1x_edit.training.feature_batch import FeatureBatch
from step1x_edit.training.feature_cache import FeatureCache, FeatureKeys
from step1x_edit.training.pair_files import StoredPicture
from step1x_edit.training.pairs import CheckedData, Example, Progress

logger = logging.getLogger(__name__)

ENGLISH, CHINESE = "en", "zh"


def feature_batches(
    checked: CheckedData,
    pipeline: Step1XEditPipeline,
    *,
    seed: int,
    first_batch: int = 0,
    instruction_dropout: float = 0.0,
    zh_share: float = 0.0,
    on_progress: Progress | None = None,
) -> "FeatureBatches":
    """Fill the cache with what is missing, then give the batches.

    Several processes share the work out, and each is given its rows of every batch.

    Args:
        checked: From `pairs.check`.
        pipeline: The model that is trained; its autoencoder and language model may leave it after
            this call, unless `FeatureBatches.needs_networks`.
        seed: Of the order, the dropout and the languages.
        first_batch: Where to begin; a resumed run goes on here.
        instruction_dropout: Share of the examples whose instruction is emptied, for guidance.
        zh_share: Share of Chinese sentences where an example has them in both languages.
        on_progress: Called with the examples whose features are there, and the examples in all.

    Raises:
        InvalidRequest: A sentence is too long for the model or holds a token of its chat, or the
            model cannot draw from words alone.
        Step1XEditError: The cache cannot be written.
    """
    _refuse_drawing(checked, pipeline)
    reader = _Reader(checked.data.cache, pipeline, instruction_dropout, zh_share)
    examples = _fill(checked, pipeline, reader, on_progress)
    collate = EditCollate(
        pipeline.instruction_encoder.tokenizer, instruction_dropout, zh_share, 0.0
    )
    return FeatureBatches(checked.data, examples, reader, pipeline, collate, seed, first_batch)


class FeatureBatches(Iterator[FeatureBatch]):
    """Endless batches; number n is a function of the settings, the seed and n alone.

    Every example on disk comes once in an epoch, or as often as its dataset is repeated, in an
    order of the epoch's own. A batch is of one size and kind (edit, text to image) and of datasets
    of one batch size; the last one of such a group is smaller where the examples do not fill it.

    Attributes:
        needs_networks: Whether autoencoder and language model are still run, for examples straight
            from the data engine.
        batches_per_epoch: Batches that show every example on disk; 0 where there is none.
        number: Of the next batch.
    """

    def __init__(
        self,
        data: PairData,
        examples: list[Example],
        reader: "_Reader",
        pipeline: Step1XEditPipeline,
        collate: EditCollate,
        seed: int,
        first_batch: int,
    ) -> None:
        self.number = first_batch
        self._seed, self._examples, self._reader = seed, examples, reader
        self._groups = _groups(data, examples)
        self.batches_per_epoch = sum(-(-len(rows) // size) for rows, size in self._groups)
        self._plan = lru_cache(maxsize=2)(self._planned)
        self._engines = engines_of(data, pipeline, collate, first_batch)
        self.needs_networks = bool(self._engines)

    def __iter__(self) -> "FeatureBatches":
        """Itself."""
        return self

    def __next__(self) -> FeatureBatch:
        """The next batch."""
        number = self.number
        self.number += 1
        place = number  # among the batches that no engine before took
        for engine in self._engines:
            taken = engine.taken(place)
            if engine.taken(place + 1) > taken:
                return next(engine)
            place -= taken
        return self._stored(number, place)

    def _stored(self, number: int, place: int) -> FeatureBatch:
        """Batch `place` of those from disk, which is batch `number` of all."""
        epoch, index = divmod(place, self.batches_per_epoch)
        rows = [self._examples[row] for row in self._plan(epoch)[index]]
        return self._reader.batch(rows, np.random.default_rng([self._seed, number, 1]))

    def _planned(self, epoch: int) -> list[np.ndarray]:
        """The batches of an epoch, as rows of the examples."""
        rng = np.random.default_rng([self._seed, epoch, 0])
        planned = [
            shuffled[start : start + size]
            for rows, size in self._groups
            for shuffled in [rng.permutation(rows)]
            for start in range(0, len(rows), size)
        ]
        return [planned[i] for i in rng.permutation(len(planned))]


class _Reader:
    """Which entries of the cache an example needs, and batches of them."""

    def __init__(
        self, cache: Path, pipeline: Step1XEditPipeline, dropout: float, zh_share: float
    ) -> None:
        self.cache, self.keys = FeatureCache(cache), FeatureKeys(pipeline)
        self.dropout, self.zh_share = dropout, zh_share
        instruction = pipeline.instruction
        self.length = instruction.max_length if instruction.pad_to_max_length else None

    def pictures(self, example: Example) -> dict[str, tuple[StoredPicture, StoredPicture | None]]:
        """Key → picture and mask."""
        found = {self.target(example): (example.target, example.mask)}
        if example.source is not None:
            found[self.keys.latents(example.source.sha256, example.size)] = (example.source, None)
        return found

    def target(self, example: Example) -> str:
        mask = example.mask and example.mask.sha256
        return self.keys.latents(example.target.sha256, example.size, mask)

    def sentences(self, example: Example) -> dict[str, str]:
        """Key → sentence, of all that may be asked for."""
        wanted = {""} if self.dropout > 0 else set()
        for chinese, share in ((True, self.zh_share), (False, 1 - self.zh_share)):
            if share > 0:
                wanted.add(_sentence(example, chinese))
        return {self.sentence(example, words): words for words in sorted(wanted)}

    def sentence(self, example: Example, words: str) -> str:
        return self.keys.features(example.source and example.source.sha256, example.size, words)

    def batch(self, rows: list[Example], rng: np.random.Generator) -> FeatureBatch:
        """This process's rows of the batch of `rows`."""
        names = tuple(row.name for row in rows)
        keys = []
        for row, (drop, language) in zip(rows, rng.random((len(rows), 2)).tolist(), strict=True):
            words = "" if drop < self.dropout else _sentence(row, language < self.zh_share)
            keys.append(self.sentence(row, words))
        length = self.length or max(self.cache.num_rows(key, "features") for key in keys)
        own, share = ranks.own_rows(len(rows))
        rows = rows[own]
        targets = [self.cache.read(self.target(row)) for row in rows]
        features = [self.cache.read(key)["features"] for key in keys[own]]
        reference = None
        if rows[0].source is not None:
            sources = [self.keys.latents(row.source.sha256, row.size) for row in rows if row.source]
            reference = torch.stack([self.cache.read(key)["tokens"] for key in sources])
        padded, mask = _padded(features, length)
        width, height = rows[0].size
        return FeatureBatch(
            names=names,
            target=torch.stack([target["tokens"] for target in targets]),
            reference=reference,
            grid=(height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN),
            features=padded,
            mask=mask,
            changed=_changed(targets),
            first=own.start,
            share=share,
        )


def _sentence(example: Example, chinese: bool) -> str:
    """The sentence in the wanted language, or the only one there is."""
    sentences = example.sentences
    wanted = CHINESE if chinese else ENGLISH
    return sentences[wanted] if wanted in sentences else next(iter(sentences.values()))


def _padded(
    features: list[Tensor], length: int
) -> tuple[Float[Tensor, "batch length width"], Bool[Tensor, "batch length"]]:
    """Rows as `InstructionEncoder.encode` gives them together."""
    lengths = torch.tensor([len(row) for row in features])
    padded = pad_sequence(features, batch_first=True)
    padded = torch.nn.functional.pad(padded, (0, 0, 0, length - padded.shape[1]))
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]


def _changed(targets: list[dict[str, Tensor]]) -> Float[Tensor, "batch tokens"] | None:
    """Changed shares; 1 all over, which weighs alike, for rows of datasets that do not say it."""
    if not any("changed" in target for target in targets):
        return None
    ones = torch.ones(len(targets[0]["tokens"]))
    return torch.stack([target.get("changed", ones) for target in targets])


def _refuse_drawing(checked: CheckedData, pipeline: Step1XEditPipeline) -> None:
    if pipeline.transformer.version != "v1.0":
        return
    drawn = [example.name for example in checked.examples if example.source is None]
    drawn += ["the data engine" for d in checked.data.datasets if _is_drawing_engine(d)]
    if drawn:
        raise InvalidRequest(
            f"{drawn[0]} has no source picture (of {len(drawn)} such), and a v1.0 model cannot "
            "draw from words alone: give sources, or train a v1.1 model"
        )


def _is_drawing_engine(dataset: object) -> bool:
    return isinstance(dataset, EnginePairs) and dataset.text_to_image


def _fill(
    checked: CheckedData,
    pipeline: Step1XEditPipeline,
    reader: _Reader,
    on_progress: Progress | None,
) -> list[Example]:
    """Make every entry that is missing; gives the examples that the model has room for."""
    reader.cache.remove_abandoned()
    examples = _with_room(checked, pipeline, reader)
    own = examples[ranks.rank() :: ranks.world_size()]
    for done, example in enumerate(own, 1):
        _make_missing(example, pipeline, reader)
        if on_progress is not None:
            on_progress(done, len(own))
    ranks.wait_for_all()
    return examples


def _make_missing(example: Example, pipeline: Step1XEditPipeline, reader: _Reader) -> None:
    """One row at a time, so that an entry does not depend on what it was made with."""
    cache = reader.cache
    for key, (picture, mask) in reader.pictures(example).items():
        if not cache.holds(key):
            tensors = {"tokens": pipeline.encode_images([_scaled(picture, example.size)])[0]}
            if mask is not None:
                tensors["changed"] = _changed_share(mask, example.size)
            cache.write(key, tensors)
    missing = {
        key: words for key, words in reader.sentences(example).items() if not cache.holds(key)
    }
    if not missing:
        return
    encoder = pipeline.instruction_encoder
    source = example.source and _scaled(example.source, example.size)
    for key, words in missing.items():
        with torch.no_grad():
            encoded = encoder.encode(encoder.tokenize([source], [words]))
        cache.write(key, {"features": encoded.features[0, encoded.mask[0]]})


def _with_room(
    checked: CheckedData, pipeline: Step1XEditPipeline, reader: _Reader
) -> list[Example]:
    """The examples whose sentences the model can read.

    Others of shards are left out and counted, as the engine writes for any model; others of files
    are an error, before anything is encoded.
    """
    tokenizer = pipeline.instruction_encoder.tokenizer

    @lru_cache(maxsize=1 << 16)
    def problem(size: tuple[int, int] | None, words: str) -> str | None:
        try:
            tokenizer([size and Image.new("RGB", size)], [words])
        except InvalidRequest as error:
            return str(error)
        return None

    kept: list[Example] = []
    problems: list[str] = []
    num_left_out = 0
    for example in checked.examples:
        size = example.size if example.source else None
        wrong = [
            found
            for key, words in reader.sentences(example).items()
            if not reader.cache.holds(key) and (found := problem(size, words))
        ]
        if not wrong:
            kept.append(example)
        elif isinstance(checked.data.datasets[example.dataset], ShardPairs):
            num_left_out += 1
        else:
            problems.append(f"{example.name}: {wrong[0]}")
    if problems or (checked.examples and not kept):
        first = problems[0] if problems else f"none of {num_left_out} sentences fits this model"
        others = f" ({len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise InvalidRequest(f"{first}{others}")
    if num_left_out:
        logger.warning(
            "%d of %d examples are left out: their sentences are too long for this model",
            num_left_out,
            len(checked.examples),
        )
    return kept


def _scaled(stored: StoredPicture, size: tuple[int, int]) -> Image.Image:
    """A picture in its own shape at a size, what juts out cut off evenly at both ends."""
    return ImageOps.fit(stored.open(), size, Image.Resampling.LANCZOS)


def _changed_share(mask: StoredPicture, size: tuple[int, int]) -> Float[Tensor, " tokens"]:
    fitted = ImageOps.fit(mask.open().convert("L"), size, Image.Resampling.BOX)
    return torch.from_numpy(squares(np.asarray(fitted, np.float32) / 255).mean(-1))


def _groups(data: PairData, examples: list[Example]) -> list[tuple[np.ndarray, int]]:
    """Rows that may share a batch, repeated as wanted, and the batch size; in order of the data."""
    groups: dict[tuple[tuple[int, int], bool, int], list[int]] = {}
    for row, example in enumerate(examples):
        dataset = data.datasets[example.dataset]
        assert isinstance(dataset, StoredPairs)  # engines have no examples
        batch_size = dataset.batch_size or data.batch_size
        kind = (example.size, example.source is None, batch_size)
        groups.setdefault(kind, []).extend([row] * dataset.repeats)
    return [(np.asarray(rows), kind[2]) for kind, rows in groups.items()]
