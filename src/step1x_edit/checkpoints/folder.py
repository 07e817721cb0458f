"""Load a diffusers-layout folder strictly: no tensor missing, unexpected or of another shape.

diffusers and transformers warn where they should refuse; here what they report becomes a
`CheckpointError`. Called by `load` and `runtime`.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from step1x_edit.checkpoints.contents import one_line, read_config, read_index, summarise
from step1x_edit.errors import CheckpointError
from step1x_edit.model.transformer import Step1XEditTransformer2DModel

NAMES_SHOWN = 5


def load_components(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """The networks of a model folder.

    Args:
        folder: Local folder with ``model_index.json``.
        dtype: Precision of the transformer and the text encoder; the autoencoder stays in float32.

    Returns:
        Component name → module, to be passed to `Step1XEditPipeline.from_pretrained`.

    Raises:
        CheckpointError: The folder is of another family, or a tensor is missing, unexpected or of
            another shape.
    """
    index = read_index(folder)
    return {
        "transformer": load_component(Step1XEditTransformer2DModel, folder / "transformer", dtype),
        "text_encoder": load_component(text_encoder_class(), folder / "text_encoder", dtype),
        "vae": load_vae(folder, index),
    }


def load_vae(folder: Path, index: Mapping[str, Any]) -> Any:
    """The autoencoder of a model folder, in float32.

    Args:
        folder: Local folder.
        index: From `read_index`; names the autoencoder's class.

    Raises:
        CheckpointError: As of `load_components`.
    """
    return load_component(_vae_class(index["vae"][1]), folder / "vae", torch.float32)


def empty_vae(folder: Path, index: Mapping[str, Any]) -> Any:
    """As `load_vae`, without the weights.

    Raises:
        CheckpointError: The configuration cannot be read or is impossible.
    """
    vae_class, place = _vae_class(index["vae"][1]), folder / "vae"
    read_config(place)
    try:
        with torch.device("meta"):
            return vae_class.from_config(vae_class.load_config(place, local_files_only=True))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{place}: {one_line(error)}") from error


def load_component(model_class: Any, folder: Path, dtype: torch.dtype) -> Any:
    """One component; what the library only reports is an error.

    Args:
        model_class: Of diffusers or transformers, or ours.
        folder: With ``config.json`` and safetensors files.
        dtype: Precision to hold the weights in.

    Raises:
        CheckpointError: A file or a tensor is missing, broken, unexpected or misshapen.
    """
    read_config(folder)  # without one, transformers would build the full-size model
    summarise(folder)
    is_transformers = hasattr(model_class, "prepare_inputs_for_generation")
    try:
        model, report = model_class.from_pretrained(
            folder,
            output_loading_info=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # reported below with the rest
            **({"dtype": dtype} if is_transformers else {"torch_dtype": dtype}),
            # With it, diffusers leaves what is missing on the meta device.
            **({} if is_transformers else {"low_cpu_mem_usage": False}),
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: {one_line(error)}") from error
    problem = describe_misfit(
        **{kind: report.get(f"{kind}_keys") for kind in ("missing", "unexpected", "mismatched")}
    )
    if problem:
        raise CheckpointError(f"{folder}: {problem}")
    return model.eval()


def describe_misfit(
    missing: Iterable[Any] | None,
    unexpected: Iterable[Any] | None,
    mismatched: Iterable[Any] | None,
) -> str | None:
    """What is wrong with a component's tensors, in one line; None where nothing is.

    Args:
        missing: Names that the model has and the files do not.
        unexpected: Names that the files have and the model does not.
        mismatched: Names with the shape found and the shape wanted.
    """
    kinds = {"missing": missing, "unexpected": unexpected, "mismatched": mismatched}
    problems = [
        f"{len(names)} {kind} ({_first(names)})"
        for kind, found in kinds.items()
        if (names := list(found or ()))
    ]
    if not problems:
        return None
    return f"tensors {'; '.join(problems)}: the weights do not fit the config"


def _first(names: Iterable[Any]) -> str:
    """The first names, those of mismatched tensors with the shape found and the shape wanted."""
    shown = sorted(name if isinstance(name, str) else _with_shapes(*name) for name in names)
    return ", ".join(shown[:NAMES_SHOWN]) + (", …" if len(shown) > NAMES_SHOWN else "")


def _with_shapes(name: str, found: Iterable[int], wanted: Iterable[int]) -> str:
    return f"{name} {[*found]} instead of {[*wanted]}"


def text_encoder_class() -> Any:
    """The language model's class, which takes seconds to import."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration


def _vae_class(name: str) -> Any:
    import diffusers

    found = getattr(diffusers, name, None)
    if found is None or not name.startswith("Autoencoder"):
        raise CheckpointError(
            f"the vae is a {name!r}, which diffusers does not know as an autoencoder"
        )
    return found
