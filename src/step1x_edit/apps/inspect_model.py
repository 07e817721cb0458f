"""`step1x models list` and `show`: what there is, and what a folder holds, from file headers."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from step1x_edit.checkpoints.catalog import CATALOG, locate
from step1x_edit.checkpoints.contents import (
    WEIGHT_COMPONENTS,
    fingerprint,
    read_index,
    read_settings,
    read_version,
    summarise,
)


def catalogue_lines() -> list[str]:
    """One line a named model."""
    return columns((name, entry.size, entry.description) for name, entry in CATALOG.items())


def model_lines(model: str) -> list[str]:
    """What a model is made of.

    Args:
        model: A name of the catalogue, a folder, or a hub repository.

    Raises:
        InvalidRequest: No such model is known.
        CheckpointError: The folder is not a complete model.
    """
    location = locate(model)
    folder = Path(location)
    if not folder.is_dir():
        described = f"{model}: {CATALOG[model].description}" if model in CATALOG else model
        return [
            described,
            f"on the hub as {location}; not looked into, as it is not a local folder",
        ]
    index = read_index(folder)
    rows: list[tuple[str, ...]] = [
        ("component", "class", "tensors", "parameters", "dtypes", "size"),
    ]
    parameters = size = 0
    for name in sorted(name for name, value in index.items() if isinstance(value, list)):
        kind = index[name][1]
        if name not in WEIGHT_COMPONENTS:
            rows.append((name, kind))
            continue
        found = summarise(folder / name)
        parameters += found.parameters
        size += found.bytes
        rows.append(
            (
                name,
                kind,
                f"{found.tensors}",
                f"{found.parameters:,}",
                " ".join(found.dtypes),
                megabytes(found.bytes),
            )
        )
    rows.append(("all", "", "", f"{parameters:,}", "", megabytes(size)))
    own = read_settings(index)
    return [
        f"{folder} ({fingerprint(folder)})",
        f"release {read_version(folder)}; by itself {own.num_inference_steps} steps, guidance "
        f"{own.guidance_scale:g}, size level {own.size_level} px",
        *columns(rows),
    ]


def columns(rows: Iterable[Sequence[str]]) -> list[str]:
    """Rows of words as lines, in columns."""
    table = [list(row) for row in rows]
    widths = [
        max(len(row[i]) for row in table if i < len(row)) for i in range(max(map(len, table)))
    ]
    return [
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=False)).rstrip()
        for row in table
    ]


def megabytes(count: int) -> str:
    """A number of bytes in words."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
