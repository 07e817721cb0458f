"""The settings of a training run, read from YAML; unknown keys are refused."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from step1x_edit.datagen.config import Settings, StreamSettings, read_yaml


def _both_ends(value: Any) -> Any:
    """One number as the range that holds it alone."""
    return (value, value) if isinstance(value, int | float) else value


Shift = Annotated[float, Field(ge=1)]
ShiftRange = Annotated[tuple[Shift, Shift], BeforeValidator(_both_ends)]


class DataSettings(StreamSettings):
    """What the data engine draws while the trainer waits, or a dataset that it made before."""

    shards: Path | None = Field(
        default=None, description="folder of a dataset to read instead; its sizes and shares hold"
    )
    num_workers: int = Field(default=1, ge=0, description="processes that draw pictures")


class AutoencoderRun(Settings):
    """Training of the mini model's autoencoder."""

    kind: Literal["autoencoder"]
    folder: Path
    data: DataSettings = DataSettings()
    seed: int = 0
    batch_size: int = Field(default=16, gt=0)
    num_steps: int = Field(default=2000, gt=0)
    lr: float = Field(default=1e-3, gt=0)
    decay_share: float = Field(default=0.4, ge=0, le=1)
    latent_noise: float = Field(
        default=0.1, ge=0, description="largest noise on the latents, in their standard deviations"
    )
    bf16: bool = True


class ReadingRun(Settings):
    """Training of the instruction encoder and the connector on sentences alone."""

    kind: Literal["reading"]
    folder: Path
    processor: Path = Field(description="folder of the tokenizer and picture preprocessing")
    start: Path | None = Field(None, description="model folder whose weights the run begins with")
    seed: int = 0
    batch_size: int = Field(default=128, gt=0)
    num_steps: int = Field(default=1500, gt=0)
    lr: float = Field(default=1e-3, gt=0)
    decay_share: float = Field(default=0.3, ge=0, le=1)
    zh_share: float = Field(default=0.4, ge=0, le=1, description="share of Chinese instructions")
    bf16: bool = True


class EditRun(Settings):
    """Training of the mini model's transformer and instruction encoder, together."""

    kind: Literal["edit"]
    folder: Path
    vae: Path = Field(description="folder of the trained autoencoder")
    processor: Path = Field(description="folder of the tokenizer and picture preprocessing")
    data: DataSettings = DataSettings()
    seed: int = 0
    batch_size: int = Field(default=32, gt=0)
    start: Path | None = Field(None, description="model folder whose weights the run begins with")
    num_steps: int = Field(gt=0)
    lr: float = Field(default=1e-3, gt=0)
    decay_share: float = Field(default=0.3, ge=0, le=1)
    time_shift: ShiftRange = Field(
        default=(1.0, 12.0),
        description="shift of the times towards noise, or its range. High ones teach what an edit "
        "puts where, which is settled at t > 0.95; low ones teach exact copying",
    )
    changed_weight: float = Field(
        default=3.0, ge=0, description="extra loss weight of tokens that the edit changes"
    )
    outline_weight: float = Field(
        default=0.0, ge=0, description="extra loss weight of tokens that the edit changes in part"
    )
    scene_weight: float = Field(
        default=1.0, ge=0, description="weight of the scene labels' loss; see alignment"
    )
    instruction_dropout: float = Field(default=0.1, ge=0, le=1)
    zh_share: float = Field(default=0.4, ge=0, le=1, description="share of Chinese instructions")
    text_to_image_share: float = Field(default=0.1, ge=0, le=1)
    train_reading: bool = Field(
        default=True,
        description="also train the instruction encoder and the connector; the velocity's gradient "
        "at a high learning rate wears off what a reading run has taught them",
    )
    reading_lr_share: float = Field(
        default=1.0, gt=0, le=1, description="of `lr`, for the reading where it is trained"
    )
    bf16: bool = True


Run = Annotated[AutoencoderRun | ReadingRun | EditRun, Field(discriminator="kind")]


def load(path: Path) -> AutoencoderRun | ReadingRun | EditRun:
    """Read a run's YAML.

    Raises:
        InvalidRequest: The file cannot be read, or a key or value is wrong.
    """
    return read_yaml(path, Run)
