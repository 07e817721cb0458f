"""What is asked of an edit and what comes back: each setting's name, default, limit and help, once.

Command line, HTTP schema, web page and nodes are read from these models. No torch here, so that
they answer at once.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from step1x_edit import images
from step1x_edit.errors import InvalidRequest

NO_GUIDANCE = -1.0


class _Checked(BaseModel):
    """Settings that are refused in one line."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    @classmethod
    def checked(cls, **settings: Any) -> Any:
        """Make one from settings.

        Raises:
            InvalidRequest: A value is out of its limits, or a name is unknown.
        """
        try:
            return cls(**settings)
        except ValidationError as error:
            raise InvalidRequest("; ".join(_line(problem) for problem in error.errors())) from error


class EditRequest(_Checked):
    """One edit, or one picture to draw where `image` is None."""

    image: Path | Image.Image | None = Field(None, description="the picture to edit")
    prompt: str = Field(description="what to change, or what to draw; English or Chinese")
    negative_prompt: str = Field("", description="what to lead away from")
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="seed of the noise; without one it is drawn and reported"
    )
    num_steps: int | None = Field(
        None, ge=1, le=1000, description="denoising steps; default: the model's own"
    )
    guidance: float | None = Field(
        None,
        ge=NO_GUIDANCE,
        le=30,
        description="strength of the instruction, 1 to 30, or -1 for none; default: the model's own",
    )
    size_level_px: int | None = Field(
        None,
        ge=64,
        le=4096,
        description="the model works on about this many pixels squared; default: the model's own",
    )
    width: int | None = Field(
        None, ge=16, le=4096, multiple_of=16, description="width in pixels of a drawn picture"
    )
    height: int | None = Field(
        None, ge=16, le=4096, multiple_of=16, description="height in pixels of a drawn picture"
    )
    mask: Path | Image.Image | None = Field(
        None, description="picture of the same size, white where the edit may change something"
    )
    keep: images.Keep = Field(
        "auto",
        description="what is kept of the picture: auto keeps what the edit did not mean to change, "
        "always does so even where the whole picture seems changed, off gives the raw result",
    )
    num_images: int = Field(1, ge=1, le=16, description="results, each from noise of its own")
    max_pixels: int | None = Field(
        images.MAX_PIXELS,
        ge=1,
        description="largest picture that is opened, in pixels; 0 on the command line lifts it",
    )

    @field_validator("prompt")
    @classmethod
    def _not_blank(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("is empty: say what to change, or what to draw")
        return prompt

    @field_validator("guidance")
    @classmethod
    def _none_or_strength(cls, guidance: float | None) -> float | None:
        if guidance is not None and guidance != NO_GUIDANCE and guidance < 1:
            raise ValueError(f"{guidance} is neither -1 (none) nor 1 to 30: give one of these")
        return guidance

    @model_validator(mode="after")
    def _fits_together(self) -> "EditRequest":
        if self.mask is not None and self.image is None:
            raise ValueError("a mask needs a picture to edit: leave it out")
        if self.image is not None and (self.width or self.height):
            raise ValueError("width and height are for drawing: an edited picture keeps its size")
        return self


class RuntimeConfig(_Checked):
    """How a model runs on this machine."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="precision of the networks; auto: float32 on a CPU, bfloat16 on a GPU"
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
        description="auto, cpu, cuda, cuda:N or mps",
    )
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads; default: torch's own"
    )


class Provenance(BaseModel):
    """How a picture was made: kept in its file, enough to make it again."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    version: str = ""
    model: str
    model_hash: str
    prompt: str
    negative_prompt: str = ""
    seed: int
    num_steps: int
    guidance: float
    size_level_px: int
    keep: images.Keep = "auto"
    width: int
    """Of the model's result, in pixels."""
    height: int
    source_name: str | None = None
    source_sha256: str | None = None
    mask_sha256: str | None = None
    index: int = 0
    """Which of several results of one request."""


class EditResult(BaseModel):
    """Finished pictures, at the source's own size, and how they came about."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    images: Sequence[Image.Image]
    provenance: Provenance
    seconds: dict[str, float]
    """Stage → seconds."""

    def save(self, targets: Sequence[Path]) -> list[Path]:
        """Write each picture to its place, provenance in its metadata.

        Args:
            targets: One file for each picture; their suffixes say the formats.

        Returns:
            The written files.

        Raises:
            InvalidRequest: A target cannot be a picture file.
            Step1XEditError: The disk is full or the place cannot be written.
        """
        for index, (image, target) in enumerate(zip(self.images, targets, strict=True)):
            own = self.provenance.model_copy(update={"index": index})
            images.save(image, target, own.model_dump_json())
        return list(targets)


def read_provenance(path: Path) -> Provenance | None:
    """How the picture in a file was made; None where the file does not say."""
    text = images.read_provenance_json(path)
    try:
        return None if text is None else Provenance.model_validate_json(text)
    except ValidationError:
        return None


def _line(problem: Any) -> str:
    """One validation problem as "name value: what is wrong"."""
    name = ".".join(str(part) for part in problem["loc"])
    value = problem.get("input")
    reason = problem["msg"].removeprefix("Value error, ")
    shown = f" {value!r}" if isinstance(value, int | float | str) else ""
    if problem["type"] == "extra_forbidden":
        return f"{name}: unknown setting"
    return f"{name}{shown}: {reason}" if name else reason
