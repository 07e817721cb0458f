"""Fetch models from Hugging Face or ModelScope: first a plan that says how much, then the files.

Both hubs say each file's size and digest, so that both are read by the same `download`. Called by
`step1x models pull`, and by `Editor.load` for a model that is not here.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple
from urllib.parse import quote

from step1x_edit.checkpoints import store
from step1x_edit.checkpoints.catalog import CATALOG, MLLM_REPOSITORY, RELEASE, VAE_FILE, locate
from step1x_edit.checkpoints.contents import one_line
from step1x_edit.checkpoints.download import RemoteFile, check_file, download, read_url
from step1x_edit.errors import CheckpointError, InvalidRequest, Step1XEditError

Source = Literal["huggingface", "modelscope"]
SOURCES: tuple[Source, ...] = ("huggingface", "modelscope")
MODELSCOPE_URL = "https://www.modelscope.cn"

# What models are made of; pictures, documents and other frameworks' weights stay where they are.
_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model")

OnBytes = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""


class Item(NamedTuple):
    """A file of a plan."""

    repository: str
    remote: RemoteFile
    target: Path


@dataclass(frozen=True)
class Plan:
    """What is to be fetched, or to be checked where it is here already.

    Attributes:
        model: As it was named.
        source: The hub.
        items: Every file of the model.
    """

    model: str
    source: Source
    items: tuple[Item, ...]

    @property
    def num_bytes(self) -> int:
        """Of the whole model."""
        return sum(item.remote.size for item in self.items)

    @property
    def missing(self) -> tuple[Item, ...]:
        """The files that are not here in their full size."""
        return tuple(item for item in self.items if not _is_here(item))

    @property
    def missing_bytes(self) -> int:
        """What is still to be fetched; parts of files are on the disk already."""
        parts = [item.target.with_name(f"{item.target.name}.part") for item in self.missing]
        begun = sum(part.stat().st_size for part in parts if part.exists())
        return max(0, sum(item.remote.size for item in self.missing) - begun)


def plan(model: str, source: Source = "huggingface") -> Plan:
    """Ask the hub what a model consists of.

    Args:
        model: A name of the catalogue, or a hub repository in the diffusers layout.
        source: Which hub.

    Raises:
        InvalidRequest: It is no such name, or the repository is not in the diffusers layout.
        Step1XEditError: The hub cannot be asked.
    """
    entry = CATALOG.get(model)
    location = locate(model)
    if Path(location).exists():
        raise InvalidRequest(f"{model!r} is on this machine already: nothing is to be fetched")
    wanted: list[tuple[str, str]] = []
    if entry is not None and entry.transformer_file:
        wanted += [(location, entry.transformer_file), (RELEASE, VAE_FILE), (MLLM_REPOSITORY, "*")]
    else:
        wanted += [(location, "*")]
    items = []
    for repository, pattern in wanted:
        place = store.place_of(repository)
        found = (
            store.folder_of(repository) if pattern == "*" else store.file_of(repository, pattern)
        )
        if found is not None and not found.is_relative_to(place):
            continue  # another program has fetched it
        files = [file for file in _list(repository, source) if _is_wanted(file.path, pattern)]
        if not files:
            raise CheckpointError(f"{repository} on {source} has no {pattern}: try the other hub")
        items += [Item(repository, file, place / _inside(file.path)) for file in files]
        if repository == location and pattern == "*":
            _require_diffusers_layout(model, source, [file.path for file in files])
    return Plan(model, source, tuple(items))


def fetch(
    to_do: Plan,
    *,
    verify: bool = False,
    on_bytes: OnBytes = lambda *_: None,
    on_file: Callable[[str, str], None] = lambda *_: None,
) -> None:
    """Carry a plan out. What is broken off goes on from there the next time.

    Args:
        to_do: From `plan`.
        verify: Also read the files that are here; a damaged one is fetched again.
        on_bytes: Called as bytes come in, or are checked.
        on_file: Called with each file's path and what became of it.

    Raises:
        Step1XEditError: No room, no connection, or somebody else is fetching it.
        CheckpointError: What came is not what the hub announced; the file is named.
    """
    missing = set(to_do.missing)
    _check_room(to_do)
    wanted = to_do.items if verify else to_do.missing
    total, done = sum(item.remote.size for item in wanted), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_bytes(done, total)

    headers = _headers(to_do.source)
    repositories = {item.repository for item in to_do.items}
    for repository in sorted(repositories):
        own = [item for item in to_do.items if item.repository == repository]
        with _locked(repository):
            record = store.read_record(repository)
            changing = [item for item in own if item in missing]
            known = dict(record)
            if changing:  # until all are whole again, the folder is not
                for item in own:
                    known.pop(item.remote.path, None)
                store.write_record(repository, known)
            for item in own if verify else changing:
                on_file(item.remote.path, _bring(item, item in missing, headers, advance))
            store.write_record(
                repository, known | {item.remote.path: item.remote.size for item in own}
            )


def _bring(
    item: Item, is_missing: bool, headers: dict[str, str], advance: Callable[[int], None]
) -> str:
    """Fetch or check a file; what was done, in words."""
    if not is_missing:
        try:
            check_file(item.remote, item.target, advance)
        except CheckpointError:
            advance(-item.target.stat().st_size)
            item.target.unlink()
            outcome = "was damaged, fetched again"
        else:
            return "is right"
    else:
        outcome = "fetched"
    download(item.remote, item.target, headers=headers, on_bytes=advance)
    return outcome


def _is_wanted(path: str, pattern: str) -> bool:
    return fnmatch(path, pattern) and path.endswith(_SUFFIXES)


def _require_diffusers_layout(model: str, source: Source, paths: list[str]) -> None:
    if "model_index.json" not in paths:
        raise InvalidRequest(
            f"{model!r} on {source} is not in the diffusers layout (it has no model_index.json): "
            f"give one of {', '.join(CATALOG)}, or fetch its files and give their path"
        )


def _is_here(item: Item) -> bool:
    return item.target.exists() and item.target.stat().st_size == item.remote.size


def _inside(path: str) -> Path:
    """A path of a repository as one below our folder, and nowhere else."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or ":" in path:
        raise CheckpointError(f"the hub names a file {path!r}, which leads out of its folder")
    return Path(*pure.parts)


def _check_room(to_do: Plan) -> None:
    place = store.place_of(to_do.model).parent
    place.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place).free
    if to_do.missing_bytes > free:
        raise Step1XEditError(
            f"{to_do.model} takes {to_do.missing_bytes:,} bytes and {place} has {free:,} free: "
            "make room, or set XDG_CACHE_HOME to a larger disk"
        )


@contextmanager
def _locked(repository: str) -> Iterator[None]:
    """Keep two commands from writing the same files."""
    from filelock import FileLock, Timeout

    place = store.place_of(repository)
    place.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(place.with_name(f"{place.name}.lock"), timeout=0):
            yield
    except Timeout as error:
        raise Step1XEditError(f"another process is fetching {repository}: wait for it") from error


def _list(repository: str, source: Source) -> list[RemoteFile]:
    """All files of a repository."""
    try:
        return (_list_modelscope if source == "modelscope" else _list_huggingface)(repository)
    except Step1XEditError:
        raise
    except Exception as error:  # the hub's client raises a dozen unrelated types
        raise Step1XEditError(
            f"{repository} cannot be listed on {source}: {type(error).__name__}: {one_line(error)}"
        ) from error


def _list_huggingface(repository: str) -> list[RemoteFile]:
    from huggingface_hub import HfApi, hf_hub_url

    info = HfApi().model_info(repository, files_metadata=True)
    return [
        RemoteFile(
            path=file.rfilename,
            size=file.size or 0,
            url=hf_hub_url(repository, file.rfilename, revision=info.sha),
            sha256=file.lfs.sha256 if file.lfs else "",
            git_sha1=file.blob_id or "",
        )
        for file in info.siblings or []
    ]


def _list_modelscope(repository: str) -> list[RemoteFile]:
    root = f"{MODELSCOPE_URL}/api/v1/models/{quote(repository)}/repo"
    answer = json.loads(read_url(f"{root}/files?Revision=master&Recursive=true"))
    return [
        RemoteFile(
            path=file["Path"],
            size=file["Size"],
            url=f"{root}?Revision={quote(file['Revision'])}&FilePath={quote(file['Path'])}",
            sha256=file["Sha256"],
        )
        for file in answer["Data"]["Files"]
        if file["Type"] != "tree"
    ]


def _headers(source: Source) -> dict[str, str]:
    """Who is asking: with the user's own token, where a hub knows one."""
    if source == "modelscope":
        return {}
    from huggingface_hub.utils import build_hf_headers

    return {name: value for name, value in build_hf_headers().items() if name != "user-agent"}
