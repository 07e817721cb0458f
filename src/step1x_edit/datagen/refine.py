"""Filter a dataset into another one. Called by ``step1x data filter``."""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from step1x_edit.datagen.filters import Check, Drops, keep
from step1x_edit.datagen.generate import MANIFEST, shard_paths
from step1x_edit.datagen.records import Triplet
from step1x_edit.datagen.shards import new_folder, read, write

DROPS = "drops.json"


def refine(
    folder: Path,
    out: Path,
    checks: Sequence[Check],
    on_progress: Callable[[int, int], None] | None = None,
    shard_size: int = 500,
) -> Drops:
    """Write the records of `folder` that pass every check to `out`, in order.

    Args:
        folder: The dataset.
        out: Folder of the new one, empty or new.
        checks: See `filters.default_checks`.
        on_progress: Called with the shards read and the shards in all.
        shard_size: Records of a shard.

    Returns:
        What was kept and dropped, which also stands in ``drops.json``.

    Raises:
        InvalidRequest: `out` holds something, or a shard is damaged.
    """
    paths = shard_paths(folder)
    new_folder(out)
    drops = Drops()

    def all_triplets() -> Iterator[Triplet]:
        for number, path in enumerate(paths, 1):
            yield from read(path)
            if on_progress is not None:
                on_progress(number, len(paths))

    kept = keep(all_triplets(), checks, drops)
    number = 0
    while group := list(islice(kept, shard_size)):
        write(out / f"shard-{number:06d}{paths[0].suffix}", group)
        number += 1
    manifest = folder / MANIFEST
    origin = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else {}
    (out / MANIFEST).write_text(json.dumps({"filtered": origin}, indent=1) + "\n", "utf-8")
    counts = {"kept": drops.kept, "dropped": dict(drops.dropped.most_common())}
    (out / DROPS).write_text(json.dumps(counts, indent=1) + "\n", "utf-8")
    return drops
