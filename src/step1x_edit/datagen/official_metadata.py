"""A dataset as the official LoRA trainer reads it: picture files and one metadata JSON.

The JSON maps the path of each target to ``{"ref_image_path": …, "caption": …}``. Called by ``step1x
data export``.
"""

import json
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from step1x_edit.datagen.generate import shard_paths
from step1x_edit.datagen.shards import new_folder, read
from step1x_edit.errors import InvalidRequest

METADATA = "metadata.json"
LANGUAGES = ("en", "zh")


def export(
    folder: Path,
    out: Path,
    language: str = "en",
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write every record's source and target as PNG, and the metadata last.

    Args:
        folder: The dataset.
        out: Folder of the files, empty or new.
        language: Of the captions, en or zh.
        on_progress: Called with the shards read and the shards in all.

    Returns:
        The metadata file. Its paths are absolute: the official trainer opens them as they stand.

    Raises:
        InvalidRequest: `out` holds something, the language is unknown, or a shard is damaged.
    """
    if language not in LANGUAGES:
        raise InvalidRequest(f"language {language!r}: give one of {', '.join(LANGUAGES)}")
    paths = shard_paths(folder)
    new_folder(out)
    (out / "source").mkdir()
    (out / "target").mkdir()
    entries: dict[str, dict[str, str]] = {}
    for number, path in enumerate(paths, 1):
        for triplet in read(path):
            source, target = (
                (out / part / f"{triplet.key}.png").resolve() for part in ("source", "target")
            )
            Image.fromarray(triplet.source).save(source)
            Image.fromarray(triplet.target).save(target)
            entries[str(target)] = {
                "ref_image_path": str(source),
                "caption": triplet.instructions[language],
            }
        if on_progress is not None:
            on_progress(number, len(paths))
    metadata = out / METADATA
    metadata.write_text(json.dumps(entries, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return metadata
