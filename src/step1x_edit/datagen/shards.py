"""Records on disk: shards of some hundreds, as WebDataset tar or as Parquet.

A tar holds, for each record, ``KEY.source.png``, ``KEY.target.png``, ``KEY.mask.png`` and
``KEY.json``; a Parquet file has the same parts as columns. Equal records give equal bytes. Written
by `generate`, read by the trainer and by ``step1x data inspect``.
"""

import io
import json
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import numpy as np
from PIL import Image

from step1x_edit.datagen.records import Triplet, from_metadata
from step1x_edit.errors import InvalidRequest, MissingExtra

Format = Literal["webdataset", "parquet"]
SUFFIXES: dict[Format, str] = {"webdataset": ".tar", "parquet": ".parquet"}
PARTS = ("source.png", "target.png", "mask.png", "json")
UNFINISHED = ".new"
PNG_LEVEL = 1
"""Of zlib: at small sizes the higher levels save a few per cent and cost most of the time; looking
for runs alone is quicker still, and no larger."""


def new_folder(out: Path) -> None:
    """Make a folder for results, or see that it is empty.

    Raises:
        InvalidRequest: It holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidRequest(f"{out} holds something else: give an empty or a new --out")
    out.mkdir(parents=True, exist_ok=True)


def write(path: Path, triplets: Iterable[Triplet]) -> int:
    """Write a shard beside its place, then rename it.

    Args:
        path: The shard; its suffix, ``.tar`` or ``.parquet``, is the format.
        triplets: The records.

    Returns:
        How many there were.
    """
    # A name of its own: the worker of a killed run may still be writing the same shard.
    beside = path.with_name(f"{path.name}.{uuid4().hex}{UNFINISHED}")
    rows = ((triplet.key, _parts(triplet)) for triplet in triplets)
    try:
        count = (_write_parquet if path.suffix == ".parquet" else _write_tar)(beside, rows)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return count


def remove_unfinished(folder: Path) -> None:
    """Delete what killed processes left half-written."""
    for left in folder.glob(f"shard-*{UNFINISHED}"):
        left.unlink(missing_ok=True)


def read(path: Path) -> Iterator[Triplet]:
    """Read a shard's records in order.

    Raises:
        InvalidRequest: The file is no shard, is cut short, or a record lacks a part.
    """
    for parts in read_parts(path):
        yield decode(parts, path)


def read_parts(path: Path) -> Iterator[dict[str, bytes]]:
    """Read a shard's records as they are stored, which is quick; `decode` makes triplets of them.

    Raises:
        InvalidRequest: The file is no shard, or is cut short.
    """
    with _damage_named(path):
        yield from _read_parquet(path) if path.suffix == ".parquet" else _read_tar(path)


def decode(parts: dict[str, bytes], path: Path) -> Triplet:
    """The triplet of a stored record; `path` is named where it is damaged.

    Raises:
        InvalidRequest: A part is missing or damaged.
    """
    with _damage_named(path):
        source, target, mask = (_picture(parts[name]) for name in PARTS[:3])
        return from_metadata(json.loads(parts["json"]), source, target, mask > 0)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except InvalidRequest:
        raise
    except (KeyError, ValueError, OSError, SyntaxError, tarfile.TarError, zlib.error) as error:
        raise InvalidRequest(
            f"{path} is damaged ({type(error).__name__}: {error}): delete it and generate again"
        ) from error


def _parts(triplet: Triplet) -> dict[str, bytes]:
    words = json.dumps(triplet.metadata(), ensure_ascii=False, separators=(",", ":"))
    mask = Image.fromarray(triplet.mask.astype(np.uint8) * 255).convert("1")
    pictures = (Image.fromarray(triplet.source), Image.fromarray(triplet.target), mask)
    return dict(zip(PARTS, (*map(_png, pictures), words.encode()), strict=True))


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=PNG_LEVEL, compress_type=zlib.Z_RLE)
    return buffer.getvalue()


def _picture(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as file:
        return np.asarray(file.convert("L") if file.mode == "1" else file.convert("RGB"))


def _write_tar(path: Path, rows: Iterator[tuple[str, dict[str, bytes]]]) -> int:
    count = 0
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for count, (key, parts) in enumerate(rows, 1):  # noqa: B007 - the count is the result
            for name, content in parts.items():
                member = tarfile.TarInfo(f"{key}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return count


def _read_tar(path: Path) -> Iterator[dict[str, bytes]]:
    with path.open("rb") as file:
        file.seek(-min(path.stat().st_size, 2 * tarfile.BLOCKSIZE), io.SEEK_END)
        # tarfile takes an archive that was cut between two members for a whole one.
        if any(file.read()):
            raise ValueError("its end is missing")
    with tarfile.open(path, "r:") as tar:
        parts: dict[str, bytes] = {}
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None  # members are files
            parts[member.name.split(".", 1)[1]] = file.read()
            if len(parts) == len(PARTS):
                yield parts
                parts = {}
    if parts:
        raise ValueError(f"its last record has only {', '.join(parts)}")


def _write_parquet(path: Path, rows: Iterator[tuple[str, dict[str, bytes]]]) -> int:
    parquet = _pyarrow()
    import pyarrow as pa

    columns: dict[str, list[Any]] = {name: [] for name in ("key", *PARTS)}
    for key, parts in rows:
        columns["key"].append(key)
        for name in PARTS:
            columns[name].append(parts[name].decode() if name == "json" else parts[name])
    parquet.write_table(pa.table(columns), path, compression="none", row_group_size=100)
    return len(columns["key"])


def _read_parquet(path: Path) -> Iterator[dict[str, bytes]]:
    with _pyarrow().ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=100, columns=list(PARTS)):
            yield from batch.to_pylist()


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtra(
            "Parquet needs pyarrow: pip install 'step1x-edit[data]', or format: webdataset"
        ) from error
    return pyarrow.parquet
