"""Check a run's datasets before the first step: what can be wrong with them is said here.

`check` reads every list and decodes every picture, in processes of its own. The trainer calls it
before it loads a model; what it gives back is what `feature_batches` makes batches of.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from step1x_edit.datagen.generate import shard_paths
from step1x_edit.datagen.operators.learned_styles import painter
from step1x_edit.errors import InvalidRequest, Step1XEditError
from step1x_edit.images import fit_size
from step1x_edit.training.data_config import (
    EnginePairs,
    FolderPairs,
    MetadataPairs,
    PairData,
    ShardPairs,
    StoredPairs,
)
from step1x_edit.training.pair_files import (
    MASK,
    SOURCE,
    TARGET,
    Listed,
    SeenPicture,
    SeenRecord,
    StoredPicture,
    list_folder,
    list_metadata,
    look_at_picture,
    look_at_shard,
)

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with what is done and what there is in all."""
Seen = TypeVar("Seen")

FEW_FILES = 64
"""So many are looked at before other processes would have started."""
LANGUAGE = ""
"""Key of an example's only sentence, whose language nobody says."""


@dataclass(frozen=True)
class Example:
    """One thing to learn, found to be readable.

    Attributes:
        name: What messages call it: its target's path, or its record.
        dataset: Place of its dataset in `PairData.datasets`.
        size: Width and height that its pictures are scaled to, in pixels.
        target: The wanted picture.
        source: The picture to edit; None for text to image.
        mask: Where they differ, where the dataset says so.
        sentences: Language → instruction, or for text to image what the target shows.
    """

    name: str
    dataset: int
    size: tuple[int, int]
    target: StoredPicture
    source: StoredPicture | None
    mask: StoredPicture | None
    sentences: Mapping[str, str]


@dataclass(frozen=True)
class CheckedData:
    """Datasets that can be trained on.

    Attributes:
        data: The settings.
        examples: All examples that are on disk, in the order of the datasets.
        left_out: Dataset → records that say no words to draw from, and were left out.
    """

    data: PairData
    examples: tuple[Example, ...]
    left_out: Mapping[str, int]

    @property
    def num_examples(self) -> int:
        """Examples on disk, each counted once; the data engine's are endless and not counted."""
        return len(self.examples)

    def hashes(self) -> dict[str, str]:
        """Dataset → twelve hexadecimal digits that change with any picture, sentence or order.

        Of the data engine, of its settings.
        """
        digests = {}
        for place, dataset in enumerate(self.data.datasets):
            digest = hashlib.sha256()
            if isinstance(dataset, EnginePairs):
                digest.update(dataset.model_dump_json(exclude={"num_workers"}).encode())
            for example in self.examples:
                if example.dataset == place:
                    parts = (example.target, example.source, example.mask)
                    shas = [part and part.sha256 for part in parts]
                    digest.update(json.dumps([shas, dict(example.sentences)]).encode())
            digests[_name_of(self.data, place)] = digest.hexdigest()[:12]
        return digests


@dataclass
class _Findings:
    """What a check comes across."""

    examples: list[Example] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    drawn: dict[str, int] = field(default_factory=dict)
    """Dataset of edits → examples without a source."""


def check(data: PairData, on_progress: Progress | None = None) -> CheckedData:
    """Read every list and decode every picture of the datasets on disk.

    Args:
        data: The datasets.
        on_progress: Called with the files looked at and the files in all, dataset by dataset.

    Raises:
        InvalidRequest: Something is missing, unreadable, of unequal sizes, outside the root, not a
            sentence, or a dataset is empty. The first problem is named, the others are counted.
        MissingExtra: Shards or learned styles need a package that is not there.
        Step1XEditError: A process that looks at pictures died.
    """
    found = _Findings()
    for place, dataset in enumerate(data.datasets):
        before = len(found.examples), len(found.problems)
        if isinstance(dataset, EnginePairs):
            if dataset.variety.learned_styles > 0:
                painter()
            continue
        if isinstance(dataset, ShardPairs):
            _check_shards(data, place, dataset, found, on_progress)
        else:
            _check_files(data, place, dataset, found, on_progress)
        if before == (len(found.examples), len(found.problems)):
            found.problems.append(_nothing(data, place, dataset, found))
    for name, count in found.drawn.items():
        logger.warning(
            "%s: %d examples have no ref_image_path: they are drawn from words alone", name, count
        )
    if found.problems:
        others = len(found.problems) - 1
        more = f" ({others} more problem{'s' * (others > 1)})" if others else ""
        raise InvalidRequest(f"{found.problems[0]}{more}")
    return CheckedData(data, tuple(found.examples), found.left_out)


def _check_files(
    data: PairData,
    place: int,
    dataset: MetadataPairs | FolderPairs,
    found: _Findings,
    on_progress: Progress | None,
) -> None:
    listed: list[Listed] = []
    if isinstance(dataset, MetadataPairs):
        _stay_inside(data.root, [dataset.metadata_file, dataset.image_dir])
        entries = list_metadata(
            dataset.metadata_file, dataset.image_dir, text_to_image=dataset.text_to_image
        )
    else:
        _stay_inside(data.root, [dataset.folder])
        entries = list_folder(dataset.folder, text_to_image=dataset.text_to_image)
    for entry in entries:
        try:
            if isinstance(entry, Listed):
                _stay_inside(data.root, [entry.target, entry.source])
                listed.append(entry)
            else:
                found.problems.append(entry)
        except InvalidRequest as error:
            found.problems.append(str(error))
    paths = list(dict.fromkeys(p for e in listed for p in (e.target, e.source) if p))
    seen = dict(zip(paths, _looked(look_at_picture, paths, on_progress), strict=True))
    # Many targets may share a broken source, which is one problem.
    found.problems += [told for told in seen.values() if isinstance(told, str)]
    num_drawn = sum(entry.source is None for entry in listed)
    if num_drawn and not dataset.text_to_image:
        found.drawn[_name_of(data, place)] = num_drawn
    for entry in listed:
        target = seen[entry.target]
        source = seen[entry.source] if entry.source else None
        if isinstance(target, str) or isinstance(source, str):
            continue
        if source is not None and source.size != target.size:
            found.problems.append(
                f"{entry.target} is {_px(target.size)} and its source {entry.source} "
                f"{_px(source.size)}: make them of one size"
            )
            continue
        size = _fitted(data, dataset, target.size, entry.name, found)
        if size is not None:
            found.examples.append(_example(entry, place, size, target, source))


def _example(
    entry: Listed,
    place: int,
    size: tuple[int, int],
    target: SeenPicture,
    source: SeenPicture | None,
) -> Example:
    return Example(
        name=entry.name,
        dataset=place,
        size=size,
        target=StoredPicture(entry.target, target.sha256),
        source=source and entry.source and StoredPicture(entry.source, source.sha256),
        mask=None,
        sentences={LANGUAGE: entry.sentence},
    )


def _check_shards(
    data: PairData,
    place: int,
    dataset: ShardPairs,
    found: _Findings,
    on_progress: Progress | None,
) -> None:
    _stay_inside(data.root, [dataset.folder])
    paths = shard_paths(dataset.folder)
    _stay_inside(data.root, paths)
    for path, told in zip(paths, _looked(look_at_shard, paths, on_progress), strict=True):
        if isinstance(told, str):
            found.problems.append(told)
            continue
        for number, record in enumerate(told):
            sentences = record.captions if dataset.text_to_image else record.instructions
            if dataset.text_to_image and not sentences:
                name = _name_of(data, place)
                found.left_out[name] = found.left_out.get(name, 0) + 1
                continue
            size = _fitted(data, dataset, record.size, f"{path}: {record.key}", found)
            if size is not None:
                found.examples.append(_record_example(path, number, record, place, size, dataset))


def _record_example(
    path: Path,
    number: int,
    record: SeenRecord,
    place: int,
    size: tuple[int, int],
    dataset: ShardPairs,
) -> Example:
    def part(name: str) -> StoredPicture:
        return StoredPicture(path, record.sha256[name], number, name)

    drawn = dataset.text_to_image
    return Example(
        name=f"{path}: {record.key}",
        dataset=place,
        size=size,
        target=part(TARGET),
        source=None if drawn else part(SOURCE),
        mask=None if drawn else part(MASK),
        sentences=record.captions if drawn else record.instructions,
    )


def _fitted(
    data: PairData, dataset: StoredPairs, size: tuple[int, int], name: str, found: _Findings
) -> tuple[int, int] | None:
    """The size that a picture is scaled to; None where it is too elongated."""
    try:
        return fit_size(*size, dataset.size_level_px or data.size_level_px, data.bucket_px)
    except InvalidRequest as error:
        found.problems.append(f"{name}: {error}")
        return None


def _looked(
    look: Callable[[Path], Seen], paths: list[Path], on_progress: Progress | None
) -> Iterator[Seen]:
    """`look` at each path, in order; at many, in a process a core."""
    weight = sum(path.stat().st_size for path in paths if path.suffix in (".tar", ".parquet"))
    if len(paths) < FEW_FILES and weight < FEW_FILES << 20:
        results: Iterable[Seen] = map(look, paths)
        yield from _counted(results, len(paths), on_progress)
        return
    # Spawned: a fork would copy the locks of the progress bar's thread.
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        try:
            chunk = max(1, min(32, len(paths) // 64))
            yield from _counted(pool.map(look, paths, chunksize=chunk), len(paths), on_progress)
        except BrokenProcessPool as error:
            raise Step1XEditError(
                "a process that looks at the pictures died (out of memory?): start again"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _counted(results: Iterable[Seen], total: int, on_progress: Progress | None) -> Iterator[Seen]:
    for done, result in enumerate(results, 1):
        if on_progress is not None:
            on_progress(done, total)
        yield result


def _stay_inside(root: Path | None, paths: Iterable[Path | None]) -> None:
    """Refuse a path that leads out of the root, through `..` or a link too."""
    if root is None:
        return
    allowed = root.resolve()
    for path in paths:
        if path is not None and not path.resolve().is_relative_to(allowed):
            raise InvalidRequest(
                f"{path} is outside the root {root}: move it there, or give another root"
            )


def _nothing(data: PairData, place: int, dataset: StoredPairs, found: _Findings) -> str:
    name = _name_of(data, place)
    if name in found.left_out:
        return (
            f"{name}: none of {found.left_out[name]} records has a caption, which text to image "
            "needs: leave text_to_image out"
        )
    if isinstance(dataset, FolderPairs):
        return (
            f"{name} holds 0 pairs: give NAME.source.png, NAME.target.png and NAME.txt, or "
            "source/NAME.png, target/NAME.png and target/NAME.txt"
        )
    return f"{name} holds 0 examples: give at least one"


def _name_of(data: PairData, place: int) -> str:
    """What a dataset is called: its path, and where that is not enough its place."""

    def path(dataset: object) -> str:
        if isinstance(dataset, MetadataPairs):
            return str(dataset.metadata_file)
        return str(dataset.folder) if isinstance(dataset, FolderPairs | ShardPairs) else "engine"

    names = [path(dataset) for dataset in data.datasets]
    name = names[place]
    return name if names.count(name) == 1 else f"{name} (datasets.{place})"


def _px(size: tuple[int, int]) -> str:
    return f"{size[0]} × {size[1]} px"
