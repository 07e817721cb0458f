"""The settings of a training run, read from YAML; unknown keys are refused."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from step1x_edit.checkpoints.catalog import DEFAULT_MODEL
from step1x_edit.datagen.config import Settings, StreamSettings, first_problem, given, read_yaml
from step1x_edit.errors import InvalidRequest
from step1x_edit.model.lora_layouts import Layout
from step1x_edit.request import RuntimeConfig
from step1x_edit.training.data_config import PairData, from_official_toml


def _both_ends(value: Any) -> Any:
    """One number as the range that holds it alone."""
    return (value, value) if isinstance(value, int | float) else value


def _resolution_or_range(value: Any) -> Any:
    return value if value == "resolution" else _both_ends(value)


Shift = Annotated[float, Field(ge=1)]
ShiftRange = Annotated[tuple[Shift, Shift], BeforeValidator(_both_ends)]
RELEASED_SHIFT = 3.1582
Optimizer = Literal["adamw", "adamw8bit"]
Offload = Literal["none", "block", "disk"]
LORA_LAYERS = r"(double|single)_blocks\..*"
"""The 304 layers that the released trainer adapts: all of the blocks, modulations too."""


class RunSettings(Settings):
    """What every run has."""

    folder: Path = Field(description="where checkpoints, log and results go")
    seed: int = 0
    report_every: int = Field(default=20, gt=0, description="steps between lines of the log")
    save_every_s: float = Field(default=300, gt=0, description="seconds between checkpoints")
    save_every: int | None = Field(None, gt=0, description="steps between checkpoints, besides")
    keep_every: int | None = Field(
        None, gt=0, description="checkpoints of these steps are kept; of the others the last two"
    )


class DataSettings(StreamSettings):
    """What the data engine draws while the trainer waits, or a dataset that it made before."""

    shards: Path | None = Field(
        default=None, description="folder of a dataset to read instead; its sizes and shares hold"
    )
    num_workers: int = Field(default=1, ge=0, description="processes that draw pictures")


class AutoencoderRun(RunSettings):
    """Training of the mini model's autoencoder."""

    kind: Literal["autoencoder"]
    data: DataSettings = DataSettings()
    batch_size: int = Field(default=16, gt=0)
    num_steps: int = Field(default=2000, gt=0)
    lr: float = Field(default=1e-3, gt=0)
    decay_share: float = Field(default=0.4, ge=0, le=1)
    latent_noise: float = Field(
        default=0.1, ge=0, description="largest noise on the latents, in their standard deviations"
    )
    bf16: bool = True


class ReadingRun(RunSettings):
    """Training of the instruction encoder and the connector on sentences alone."""

    kind: Literal["reading"]
    processor: Path = Field(description="folder of the tokenizer and picture preprocessing")
    data: DataSettings = Field(
        default=DataSettings(), description="of which the sentences are read, and no picture drawn"
    )
    start: Path | None = Field(None, description="model folder whose weights the run begins with")
    batch_size: int = Field(default=128, gt=0)
    num_steps: int = Field(default=1500, gt=0)
    lr: float = Field(default=1e-3, gt=0)
    decay_share: float = Field(default=0.3, ge=0, le=1)
    zh_share: float = Field(default=0.4, ge=0, le=1, description="share of Chinese instructions")
    bf16: bool = True


class EditRun(RunSettings):
    """Training of the mini model's transformer and instruction encoder, together."""

    kind: Literal["edit"]
    vae: Path = Field(description="folder of the trained autoencoder")
    processor: Path = Field(description="folder of the tokenizer and picture preprocessing")
    data: DataSettings = DataSettings()
    batch_size: int = Field(default=32, gt=0)
    parts: int = Field(
        default=2, gt=0, description="of a batch, worked on side by side, each on cores of its own"
    )
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


class Sample(Settings):
    """A picture that a run edits, or draws, again and again, to show how far it is."""

    prompt: str = Field(min_length=1)
    image: Path | None = None
    seed: int = Field(default=0, ge=0)
    num_steps: int | None = Field(None, description="denoising steps; default: the model's own")
    size_level_px: int | None = Field(
        None, description="the model works on so many pixels squared; default: the model's own"
    )


class TuningRun(RunSettings):
    """What runs over a finished model have: released, converted, or the mini."""

    model: str = Field(
        default=DEFAULT_MODEL,
        description="a name of `step1x models list`, a model folder or file, or a hub name",
    )
    data: PairData
    num_steps: int = Field(default=2000, gt=0)
    lr: float = Field(default=1e-4, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="of the learning rate, after the warm-up; the others fall to 0"
    )
    warmup_steps: int = Field(default=0, ge=0)
    optimizer: Optimizer = Field(
        "adamw", description="adamw8bit keeps its state in eight bits (bitsandbytes)"
    )
    weight_decay: float = Field(default=0.01, ge=0)
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="the result is this moving average; without, the last weights"
    )
    time_shift: Annotated[
        ShiftRange | Literal["resolution"], BeforeValidator(_resolution_or_range)
    ] = Field(
        (RELEASED_SHIFT, RELEASED_SHIFT),
        description="shift of the times towards noise, its range, or `resolution` as in sampling",
    )
    changed_weight: float = Field(
        default=0.0, ge=0, description="extra loss weight of tokens that the edit changes"
    )
    instruction_dropout: float = Field(
        default=0.0, ge=0, le=1, description="share of emptied instructions, for guidance"
    )
    zh_share: float = Field(default=0.4, ge=0, le=1, description="share of Chinese instructions")
    gradient_checkpointing: bool = Field(
        True, description="blocks are computed twice, and their inner values not kept"
    )
    offload: Offload = Field(
        "none",
        description="where the weights of a LoRA run's blocks wait until they are needed. block: "
        "in main memory, for GPUs. disk: in the model's files, two blocks in memory; slower, the "
        "same result",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="arithmetic; auto: float32 on a CPU, bfloat16 on a GPU"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps")
    threads: int | None = None
    offline: bool = False
    official_source: Path | None = None
    samples: tuple[Sample, ...] = Field((), description="made every `sample_every` steps")
    sample_every: int = Field(default=250, gt=0, description="steps")
    tensorboard: bool = Field(True, description="write TensorBoard's files, where it is installed")
    save_dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="of the result")

    def runtime(self) -> RuntimeConfig:
        """How the model runs."""
        names = ("dtype", "device", "threads", "offload", "offline", "official_source")
        return RuntimeConfig.checked(**{name: getattr(self, name) for name in names})


class LoraRun(TuningRun):
    """Training of a LoRA; the model itself stays as it is."""

    kind: Literal["lora"]
    rank: int = Field(default=64, gt=0)
    alpha: float = Field(default=32, gt=0, description="the update counts alpha / rank")
    layers: str = Field(
        default=LORA_LAYERS, description="regular expression of the adapted layers' official names"
    )
    weights: Literal["auto", "fp8", "int8", "int4"] = Field(
        "auto", description="how the model's blocks are stored meanwhile; auto: as the files are"
    )
    layouts: tuple[Layout, ...] = Field(("kohya",), min_length=1, description="of the result")

    @model_validator(mode="after")
    def _blocks_come_back(self) -> "LoraRun":
        if self.offload != "none" and not self.gradient_checkpointing:
            raise ValueError(
                f"offload {self.offload} lets go of a block's weights before their gradient is "
                "computed: leave gradient_checkpointing on, which brings them back, or set offload "
                "to none"
            )
        return self

    def runtime(self) -> RuntimeConfig:
        """How the model runs."""
        return super().runtime().model_copy(update={"weights": self.weights})


class FullRun(TuningRun):
    """Training of the whole transformer with its connector; the language model is frozen."""

    kind: Literal["full"]
    lr: float = Field(default=1e-5, gt=0)
    instruction_dropout: float = Field(
        default=0.1, ge=0, le=1, description="share of emptied instructions, for guidance"
    )
    layouts: tuple[Literal["diffusers", "official"], ...] = Field(
        ("diffusers", "official"), min_length=1, description="of the result"
    )

    @model_validator(mode="after")
    def _stays_in_memory(self) -> "FullRun":
        if self.offload != "none":
            raise ValueError(
                f"offload {self.offload}: weights that are trained cannot wait elsewhere: set it "
                "to none, or train a LoRA (kind: lora)"
            )
        return self


AnyRun = AutoencoderRun | ReadingRun | EditRun | LoraRun | FullRun
Run = Annotated[AnyRun, Field(discriminator="kind")]


def load(path: Path, **overrides: Any) -> AnyRun:
    """Read a run's YAML.

    Args:
        path: The file.
        overrides: See `read_yaml`.

    Raises:
        InvalidRequest: The file cannot be read, or a key or value is wrong.
    """
    return read_yaml(path, Run, **overrides)


def load_official(path: Path, **settings: Any) -> LoraRun:
    """A LoRA run over the data of the released trainer's TOML, with that trainer's defaults.

    Args:
        path: The TOML.
        settings: Of the run; None leaves one at its default.

    Raises:
        InvalidRequest: The file cannot be read, or a key or value is wrong.
    """
    data = from_official_toml(path)
    try:
        return LoraRun.model_validate(
            {"kind": "lora", "weights": "fp8", "zh_share": 0.0, "data": data, **given(settings)}
        )
    except ValidationError as error:
        raise InvalidRequest(first_problem(error)) from error
