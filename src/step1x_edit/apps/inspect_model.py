"""`step1x models list` and `show`: what there is, and what a path holds, from file headers."""

from step1x_edit.apps.columns import columns, megabytes
from step1x_edit.apps.pull import describe
from step1x_edit.checkpoints.catalog import CATALOG
from step1x_edit.checkpoints.contents import V1P2, WEIGHT_COMPONENTS, summarise
from step1x_edit.checkpoints.resolve import find
from step1x_edit.errors import CheckpointError


def catalogue_lines() -> list[str]:
    """One line a named model."""
    return columns((name, entry.size, entry.description) for name, entry in CATALOG.items())


def model_lines(model: str) -> list[str]:
    """What a model is made of.

    Args:
        model: A name of the catalogue, a folder, an official file, or a hub repository.

    Raises:
        InvalidRequest: No such model is known.
        CheckpointError: The path is no model's.
    """
    files = find(model)
    if files is None:
        described = f"{model}: {CATALOG[model].description}" if model in CATALOG else model
        return [described, describe(model)]
    rows: list[tuple[str, ...]] = [
        ("component", "class", "tensors", "parameters", "dtypes", "size"),
    ]
    parameters = size = 0
    problem = ""
    try:
        files.check()
    except CheckpointError as error:
        problem = str(error)
    for name, part in sorted(files.components.items()):
        kind = files.classes[name]
        if name not in WEIGHT_COMPONENTS:
            rows.append((name, kind))
            continue
        if not part.exists():
            rows.append((name, kind, "missing"))
            continue
        found = summarise(part)
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
    own = files.settings
    hash_ = "" if problem else f" ({files.fingerprint()})"
    version = files.version
    release = f"{version}, which cannot be run yet" if version == V1P2 else version
    return [
        f"{files.place}{hash_}",
        f"{files.layout} layout, release {release}; by itself {own.num_inference_steps} steps, "
        f"guidance {own.guidance_scale:g}, size level {own.size_level} px",
        *columns(rows),
        *([f"cannot be loaded: {problem}"] if problem else []),
    ]
