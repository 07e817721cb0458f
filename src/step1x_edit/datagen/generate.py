"""Make a dataset: shards, on local processes or on a Ray cluster, by the same code.

A shard is a function of the settings and its number alone, and its file appears whole or not at
all. So the number of workers and the engine change only the speed, and a run that was killed goes
on with the shards that are missing. Called by ``step1x data generate``.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.config import DataConfig
from step1x_edit.datagen.operators.learned_styles import painter
from step1x_edit.datagen.pipeline import make_triplet, record_seed, sample_category
from step1x_edit.datagen.records import Triplet
from step1x_edit.datagen.shards import SUFFIXES, new_folder, remove_unfinished, write
from step1x_edit.errors import InvalidRequest, MissingExtra, Step1XEditError
from step1x_edit.files import write_text

MANIFEST = "dataset.json"
ONLY_SPEED = {"out", "num", "engine", "num_workers"}
"""Settings that may change from one run of a dataset to the next."""
DIED = "a worker process died (out of memory?): run the same command again to go on"
_atlas = lru_cache(Atlas)


@dataclass
class Summary:
    """What a run did."""

    made: int = 0
    found: int = 0
    """Records of shards that were there already."""
    categories: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """For people."""
        shares = ", ".join(f"{name} {count}" for name, count in sorted(self.categories.items()))
        return [f"{self.made} records made, {self.found} there already", shares]


def generate(config: DataConfig, on_progress: Callable[[int, int], None] | None = None) -> Summary:
    """Make the shards of `config` that are missing.

    Args:
        config: The run.
        on_progress: Called with the records done and the records in all.

    Raises:
        InvalidRequest: The folder holds another dataset, or something else.
        MissingExtra: The engine, the format or the learned styles need a package that is not there.
        Step1XEditError: A worker process died.
    """
    if config.variety.learned_styles > 0:
        painter()  # what is missing is said before anything is written
    _open_folder(config)
    summary = Summary()
    missing = []
    for number in range(-(-config.num // config.shard_size)):
        told = _told(config, number)
        if told is None or told["count"] != len(_records_of(config, number)):
            missing.append(number)
        else:
            summary.found += told["count"]
            summary.categories.update(told["categories"])
    engine = _on_ray if config.engine == "ray" else _locally
    for told in engine(config, missing):
        summary.made += told["count"]
        summary.categories.update(told["categories"])
        if on_progress is not None:
            on_progress(summary.made + summary.found, config.num)
    remove_unfinished(config.out)
    return summary


def shard_paths(folder: Path) -> list[Path]:
    """The shards of a dataset in order.

    Raises:
        InvalidRequest: There are none.
    """
    paths = sorted(path for path in folder.glob("shard-*") if path.suffix in SUFFIXES.values())
    if not paths:
        raise InvalidRequest(f"{folder} holds no shards: make some with `step1x data generate`")
    return paths


def triplets_of(config: DataConfig, number: int) -> Iterator[Triplet]:
    """The records of shard `number`, all of one size."""
    sizes = list(config.sizes)
    shares = np.asarray([config.sizes[size] for size in sizes])
    rng = np.random.default_rng([config.seed, number])
    width, height = map(int, str(rng.choice(sizes, p=shares / shares.sum())).split("x"))
    for record in _records_of(config, number):
        seed = record_seed(config.seed, record)
        category = sample_category(np.random.default_rng([seed, 0]), config.shares)
        yield make_triplet(seed, category, _atlas(), width, height, config.variety)


def make_shard(config: DataConfig, number: int) -> dict[str, Any]:
    """Write shard `number`, then beside it what it holds: with both, it is done."""
    categories: Counter[str] = Counter()

    def counted() -> Iterator[Triplet]:
        for triplet in triplets_of(config, number):
            categories[triplet.category] += 1
            yield triplet

    path = _shard_path(config, number)
    told = {"count": write(path, counted()), "categories": dict(sorted(categories.items()))}
    path.with_suffix(".json").write_text(json.dumps(told), encoding="utf-8")
    return told


def _records_of(config: DataConfig, number: int) -> range:
    first = number * config.shard_size
    return range(first, min(first + config.shard_size, config.num))


def _shard_path(config: DataConfig, number: int) -> Path:
    return config.out / f"shard-{number:06d}{SUFFIXES[config.format]}"


def _told(config: DataConfig, number: int) -> dict[str, Any] | None:
    """What a finished shard holds; None where there is none."""
    path = _shard_path(config, number)
    try:
        told = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return told if path.exists() else None


def _open_folder(config: DataConfig) -> None:
    """Make the folder, or see that what it holds is this dataset."""
    manifest = config.out / MANIFEST
    wanted = config.model_dump(mode="json", exclude=ONLY_SPEED)
    if manifest.exists():
        try:
            there = json.loads(manifest.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InvalidRequest(f"{manifest} is damaged: give another --out") from error
        for name in wanted:
            if there.get(name) != wanted[name]:
                raise InvalidRequest(
                    f"{config.out} holds a dataset with {name} {there.get(name)}, not "
                    f"{wanted[name]}: give another --out"
                )
        return
    new_folder(config.out)
    write_text(manifest, json.dumps(wanted, indent=1) + "\n")


def _locally(config: DataConfig, numbers: list[int]) -> Iterator[dict[str, Any]]:
    if config.num_workers == 1 or len(numbers) < 2:
        yield from (make_shard(config, number) for number in numbers)
        return
    # Spawned: a fork would copy the locks of the progress bar's thread.
    with ProcessPoolExecutor(config.num_workers, get_context("spawn")) as pool:
        futures = [pool.submit(make_shard, config, number) for number in numbers]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise Step1XEditError(DIED) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _on_ray(config: DataConfig, numbers: list[int]) -> Iterator[dict[str, Any]]:
    """One Ray task a shard; Ray repeats the tasks of a worker that died."""
    try:
        import ray
        from ray.exceptions import OutOfMemoryError, WorkerCrashedError
    except ImportError as error:
        raise MissingExtra(
            "engine ray needs Ray: pip install 'step1x-edit[ray]', or engine: local"
        ) from error
    if not numbers:
        return
    # The cluster that is running, or one of this machine's cores for as long as this process lives.
    ray.init(
        ignore_reinit_error=True,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    # Paths are the cluster's: relative ones would be each worker's own.
    config = config.model_copy(update={"out": config.out.resolve()})
    make = ray.remote(make_shard)
    open_tasks = [make.remote(config, number) for number in numbers]
    try:
        while open_tasks:
            done, open_tasks = ray.wait(open_tasks)
            yield from ray.get(done)
    except (WorkerCrashedError, OutOfMemoryError) as error:
        raise Step1XEditError(DIED) from error
