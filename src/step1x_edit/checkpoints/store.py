"""Where fetched models are on this machine: our own folder, and the Hugging Face cache.

Each repository has a folder of plain files in the user's cache, and in it `files.json`, which lists
the files that are whole. What other programs have put into the Hugging Face cache is used where it
is complete. Called by `resolve` to find, and by `hub` to fill.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from step1x_edit.checkpoints.contents import WEIGHT_COMPONENTS, read_index, weight_files
from step1x_edit.errors import CheckpointError

_RECORD = "files.json"


def place_of(repository: str) -> Path:
    """The folder of a repository's fetched files, which need not exist."""
    return user_cache_path("step1x-edit") / "models" / repository.replace("/", "--")


def read_record(repository: str) -> dict[str, Any]:
    """Path in the repository → size, of the files that were fetched whole."""
    try:
        return json.loads((place_of(repository) / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write_record(repository: str, sizes: Mapping[str, int]) -> None:
    """Note which files are whole."""
    place = place_of(repository)
    place.mkdir(parents=True, exist_ok=True)
    part = place / f"{_RECORD}.part"
    part.write_text(json.dumps(dict(sizes), indent=1), encoding="utf-8")
    part.replace(place / _RECORD)


def file_of(repository: str, path: str) -> Path | None:
    """One file of a repository; None where it is not here."""
    own = place_of(repository) / path
    if path in read_record(repository) and own.exists():
        return own
    return _in_hub_cache(repository, path)


def folder_of(repository: str) -> Path | None:
    """A repository that is a model folder; None where it is not here, or not whole."""
    own, record = place_of(repository), read_record(repository)
    if record and all((own / path).exists() for path in record):
        return own
    for name in ("model_index.json", "config.json"):
        found = _in_hub_cache(repository, name)
        if found is not None and _is_whole(found.parent):
            return found.parent
    return None


def _in_hub_cache(repository: str, path: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache  # half a second, not needed for paths

    found = try_to_load_from_cache(repository, path)
    return Path(found) if isinstance(found, str) else None


def _is_whole(folder: Path) -> bool:
    """Whether nothing is missing that the folder itself names."""
    try:
        if not (folder / "model_index.json").exists():
            weight_files(folder)
            return all(
                (folder / name).exists() for name in ("preprocessor_config.json", "tokenizer.json")
            )
        index = read_index(folder)
        for name in WEIGHT_COMPONENTS:
            weight_files(folder / name)
        return all((folder / name).is_dir() for name in index if isinstance(index[name], list))
    except CheckpointError:
        return False
