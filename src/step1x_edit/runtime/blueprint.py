"""A model's networks without their weights: of any files, or of a release that is not here.

`memory` runs them on tensors without values to learn what an edit would take.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from step1x_edit.checkpoints.catalog import CATALOG
from step1x_edit.checkpoints.load import empty_autoencoder
from step1x_edit.checkpoints.resolve import ModelFiles
from step1x_edit.checkpoints.tensor_files import Place, TensorFiles
from step1x_edit.errors import InvalidRequest
from step1x_edit.model.config import (
    RELEASED_SAMPLING,
    RELEASED_TEXT,
    RELEASED_TRANSFORMER,
    RELEASED_VAE,
    RELEASED_VISION,
)
from step1x_edit.model.instruction_config import (
    RELEASE_V1,
    InstructionConfig,
    read_instruction,
)
from step1x_edit.model.transformer import Step1XEditTransformer2DModel
from step1x_edit.runtime.load import open_text_encoder, open_transformer, text_encoder_of
from step1x_edit.runtime.precision import FP8, block_linears


class Network(NamedTuple):
    """A network on the meta device, and where its tensors would be read."""

    model: Any
    places: Mapping[str, Place]


@dataclass(frozen=True)
class Blueprint:
    """What `memory` needs to know of a model.

    Attributes:
        networks: Makes "text_encoder" and "transformer" anew, in the order in which they load.
        vae: Makes the autoencoder, on the meta device.
        instruction: How the model wants its instructions.
        guidance: Its own guidance.
        size_level_px: Its own size level.
    """

    networks: Callable[[], dict[str, Network]]
    vae: Callable[[], Any]
    instruction: InstructionConfig
    guidance: float
    size_level_px: int


def blueprint(model: str, files: ModelFiles | None) -> Blueprint:
    """The blueprint of a model.

    Args:
        model: What it was asked for by.
        files: From `checkpoints.resolve`, checked; None where the model is not here. Then the
            sizes of the releases are taken.

    Raises:
        InvalidRequest: The model is not here and no release.
        CheckpointError: The files are not what they should be.
    """
    if files is not None:
        return _of_files(files)
    known = [entry for name, entry in CATALOG.items() if model in (name, entry.location)]
    if not known:
        raise InvalidRequest(
            f"{model} is not on this machine, so that its sizes are unknown: fetch it with `step1x "
            f"models pull {model}`, or give one of {', '.join(CATALOG)}"
        )
    return _released(FP8 if "fp8" in known[0].transformer_file.lower() else torch.bfloat16)


def _of_files(files: ModelFiles) -> Blueprint:
    def networks() -> dict[str, Network]:
        opened = {
            "text_encoder": open_text_encoder(files.components["text_encoder"]),
            "transformer": open_transformer(files.components["transformer"]),
        }
        return {name: Network(model, part.places) for name, (model, part) in opened.items()}

    own = files.settings
    return Blueprint(
        networks,
        lambda: empty_autoencoder(files),
        read_instruction(files.folder),
        own.guidance_scale,
        own.size_level,
    )


def _released(transformer_dtype: torch.dtype) -> Blueprint:
    """The sizes of the v1 releases, which are the same; v1.0 has one number more."""

    def networks() -> dict[str, Network]:
        from transformers import Qwen2_5_VLConfig

        config = Qwen2_5_VLConfig(
            text_config=RELEASED_TEXT, vision_config=RELEASED_VISION, tie_word_embeddings=False
        )
        with torch.device("meta"):
            transformer = Step1XEditTransformer2DModel(**RELEASED_TRANSFORMER)
        text_encoder = text_encoder_of(config)
        return {
            "text_encoder": Network(text_encoder, _places(text_encoder, torch.bfloat16)),
            "transformer": Network(transformer, _places(transformer, transformer_dtype)),
        }

    return Blueprint(
        networks,
        _released_vae,
        RELEASE_V1,
        RELEASED_SAMPLING["guidance_scale"],
        RELEASED_SAMPLING["size_level"],
    )


def _released_vae() -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    with torch.device("meta"):
        return AutoencoderKL(**RELEASED_VAE)


def _places(model: Any, linear_dtype: torch.dtype) -> dict[str, Place]:
    """Files of bfloat16, the linear layers of the blocks in a dtype of their own."""
    places = {
        name: Place(Path(), 0, torch.bfloat16, tuple(parameter.shape))
        for name, parameter in model.named_parameters()
    }
    for name, _ in block_linears(model):
        key = f"{name}.weight"
        places[key] = places[key]._replace(dtype=linear_dtype)
    return places


class ValuelessFiles(TensorFiles):
    """Files that give tensors of the right shapes and dtypes without values.

    Args:
        network: Whose files.
        like: A tensor of torch's `FakeTensorMode`; what is read is of its kind.
    """

    def __init__(self, network: Network, like: Tensor) -> None:
        places = dict(network.places)
        for name, place in network.places.items():
            scale = f"{name}_scale"
            if place.dtype == FP8 and scale not in places:  # cast as it was: the scales are ones
                places[scale] = replace_shape(place, (place.shape[0], 1), torch.bfloat16)
        super().__init__(Path("the model"), places)
        self._like = like

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """As of `TensorFiles`."""
        place = self.places[name]
        shape = place.shape
        if rows is not None:
            shape = (len(range(*rows.indices(shape[0]))), *shape[1:])
        return self._like.new_empty(shape, dtype=place.dtype)


def replace_shape(place: Place, shape: tuple[int, ...], dtype: torch.dtype) -> Place:
    """The same place with a tensor of another shape and dtype."""
    return place._replace(shape=shape, dtype=dtype)
