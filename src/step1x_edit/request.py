"""What is asked of an edit and what comes back: each setting's name, default, limit and help, once.

Command line, HTTP schema, web page and nodes are read from these models. No torch here, so that
they answer at once.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from PIL import Image
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo
from typing_extensions import Self

from step1x_edit import images
from step1x_edit.errors import InvalidRequest

NO_GUIDANCE = -1.0
MAX_PROMPT_CHARS = 8000
MAX_SHOWN_CHARS = 60
# Key under which a setting whose limits are no plain range says them.
LIMIT = "limit"

PictureSource = Annotated[
    Path | Image.Image | None, WithJsonSchema({"type": "string", "format": "binary"})
]
ModelForm = Literal["diffusers", "official", "fp8", "int8", "int4"]
"""What a model can be converted to."""

PICTURE_LIMIT: JsonDict = {LIMIT: "a file path or an opened picture"}
MAX_LORA_WEIGHT = 10.0


class _Checked(BaseModel):
    """Settings that are refused in one line."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    @classmethod
    def checked(cls, **settings: Any) -> Self:
        """Make one from settings.

        Raises:
            InvalidRequest: A value is out of its limits, or a name is unknown; with value, limit
                and fix of each.
        """
        try:
            return cls(**settings)
        except ValidationError as error:
            lines: dict[object, str] = {}
            for problem in error.errors(include_url=False):
                # A setting of several types fails once for each: the first says it.
                name = problem["loc"][0] if problem["loc"] else None
                lines.setdefault(name, _line(cls, dict(problem)))
            raise InvalidRequest("; ".join(lines.values())) from error


class EditRequest(_Checked):
    """One edit, or one picture to draw where `image` is None."""

    image: PictureSource = Field(
        None, json_schema_extra=PICTURE_LIMIT, description="the picture to edit"
    )
    prompt: str = Field(
        max_length=MAX_PROMPT_CHARS,
        description="what to change, or what to draw; English or Chinese",
    )
    negative_prompt: str | None = Field(
        None,
        max_length=MAX_PROMPT_CHARS,
        description="what to lead away from; default: nothing for an edit, the model's own list of "
        "faults for a drawn picture",
    )
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
        json_schema_extra={LIMIT: "1 to 30, or -1 for none"},
        description="how closely to follow, 1 to 30, or -1 for none; default: the model's own",
    )
    size_level_px: int | None = Field(
        None,
        ge=64,
        le=2048,
        description="the model works on about this many pixels squared; default: the model's own",
    )
    width: int | None = Field(
        None,
        ge=16,
        le=4096,
        multiple_of=16,
        description="width in pixels of a drawn picture; default: the model's own",
    )
    height: int | None = Field(
        None,
        ge=16,
        le=4096,
        multiple_of=16,
        description="height in pixels of a drawn picture; default: the model's own",
    )
    mask: PictureSource = Field(
        None,
        json_schema_extra=PICTURE_LIMIT,
        description="picture of the same size: white where the edit may change something, black "
        "where every pixel has to stay",
    )
    keep: images.Keep = Field(
        "auto",
        description="what is kept of the picture. auto: a change of tone or colour that all of it "
        "follows is applied to all of it; any other stays where it is seen, and every pixel "
        "outside is left as it was. always: the first kind, too, only where it is seen. off: "
        "nothing is kept, the raw result is enlarged",
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
            limit = _limit(cls.model_fields["guidance"])
            raise ValueError(f"is {guidance:g}, {limit}")
        return guidance

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.image is None and self.mask is not None:
            raise ValueError("a mask needs a picture to edit: leave it out, or give an image")
        if self.image is None and self.size_level_px is not None:
            raise ValueError("size_level_px is for edits: give width and height of a drawn picture")
        if self.image is not None and (self.width or self.height):
            raise ValueError("width and height are for drawing: an edited picture keeps its size")
        return self


class LoraChoice(BaseModel):
    """A LoRA file to put on a model, and how strongly."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: Path
    weight: float = Field(1.0, ge=-MAX_LORA_WEIGHT, le=MAX_LORA_WEIGHT)

    @classmethod
    def read(cls, text: str) -> Self:
        """Make one from "FILE" or "FILE:weight".

        Raises:
            ValueError: The weight is out of its limits.
        """
        name, colon, number = text.rpartition(":")
        try:
            weight = float(number) if colon and name else None
        except ValueError:  # the colon is part of the name
            weight = None
        if weight is None:
            return cls(file=Path(text), weight=1.0)
        if not abs(weight) <= MAX_LORA_WEIGHT:
            limit = f"the limit is {-MAX_LORA_WEIGHT:g} to {MAX_LORA_WEIGHT:g}"
            raise ValueError(f"{text} has the weight {weight:g}, {limit}: choose another")
        return cls(file=Path(name), weight=weight)


class RuntimeConfig(_Checked):
    """How a model runs on this machine."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="precision of the networks; auto: float32 on a CPU, bfloat16 on a GPU"
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
        json_schema_extra={LIMIT: "auto, cpu, mps, cuda or cuda:N"},
        description="auto, cpu, cuda, cuda:N or mps",
    )
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads; default: torch's own"
    )
    weights: Literal["auto", "fp8", "int8", "int4"] = Field(
        "auto",
        description="how the transformer's and the language model's blocks are stored; fewer bits "
        "take less memory and come a little less close. auto: as the files are",
    )
    offload: Literal["none", "model", "block", "disk"] = Field(
        "none",
        description="where weights wait until they are needed. none: on the device. model, block: "
        "in main memory, network by network or block by block, for GPUs; on a CPU, block leaves "
        "the language model in its files. disk: in the model's files, two blocks in memory; "
        "slower, the same picture",
    )
    offline: bool = Field(False, description="never touch the network: what is not here is refused")
    official_source: Path | None = Field(
        None,
        description="checkout of the official repository, whose texts are read instead of fetched",
    )
    lora: tuple[LoraChoice, ...] = Field(
        (),
        json_schema_extra={LIMIT: "FILE or FILE:weight, or several of them"},
        description="a LoRA to put on the model, FILE or FILE:weight with a weight from -10 to 10 "
        "(default 1); kohya, PEFT or ComfyUI layout; may be given several times",
    )

    @field_validator("lora", mode="before")
    @classmethod
    def _lora_from_text(cls, value: Any) -> Any:
        entries = [value] if isinstance(value, str | Path) else value
        if not isinstance(entries, Sequence):
            return entries
        return tuple(
            LoraChoice.read(str(each)) if isinstance(each, str | Path) else each for each in entries
        )


class AppliedLora(BaseModel):
    """A LoRA that a picture was made with."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str
    """Of its file, without folders."""
    sha256: str
    """The first twelve digits."""
    weight: float


class Provenance(BaseModel):
    """How a picture was made: kept in its file, enough to make it again.

    The same provenance gives identical pixels.
    """

    # Files of later versions may say more.
    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())

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
    lora: tuple[AppliedLora, ...] = ()
    """In the order in which they were given."""
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


def _line(model: type[_Checked], problem: dict[str, Any]) -> str:
    """One validation problem as "name is value, limit: fix"."""
    kind, value, context = problem["type"], problem["input"], problem.get("ctx", {})
    if kind == "value_error":
        return " ".join([*map(str, problem["loc"]), str(context["error"])])
    name = str(problem["loc"][0])
    if kind == "missing":
        return f"{name} is missing: give it"
    if kind == "extra_forbidden":
        return f"{name}: unknown setting: the settings are {', '.join(model.model_fields)}"
    if kind == "string_too_long":
        limit = context["max_length"]
        return f"{name} has {len(value)} characters, the limit is {limit}: shorten it"
    shown = repr(value)
    if len(shown) > MAX_SHOWN_CHARS:
        shown = f"{shown[:MAX_SHOWN_CHARS]}…"
    return f"{name} is {shown}, {_limit(model.model_fields[name]) or problem['msg']}"


def _limit(setting: FieldInfo) -> str:
    """What a setting may be, from its definition; empty where that says nothing."""
    extra = setting.json_schema_extra
    names = ("ge", "le", "lt", "multiple_of")
    bounds = {n: getattr(m, n) for m in setting.metadata for n in names if hasattr(m, n)}
    if isinstance(extra, dict) and LIMIT in extra:
        limit = f"the limit is {extra[LIMIT]}"
    elif get_origin(setting.annotation) is Literal:
        limit = f"the choices are {', '.join(map(str, get_args(setting.annotation)))}"
    elif "lt" in bounds:
        limit = f"the limit is {bounds['ge']} to {bounds['lt'] - 1}"
    elif "le" in bounds:
        limit = f"the limit is {bounds['ge']} to {bounds['le']}"
    elif "ge" in bounds:
        limit = f"the limit is {bounds['ge']} and more"
    else:
        return ""
    if "multiple_of" in bounds:
        limit += f" in steps of {bounds['multiple_of']}"
    return f"{limit}: choose one of these"
