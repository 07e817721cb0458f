"""The settings of a data run, read from YAML; unknown keys are refused."""

import os
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from step1x_edit.datagen.operators import OPERATORS
from step1x_edit.datagen.pipeline import DEFAULT_SHARES
from step1x_edit.datagen.shards import Format
from step1x_edit.datagen.variety import EVERYTHING, PLAIN, Variety
from step1x_edit.errors import InvalidRequest

SIDE_STEP_PX, MIN_SIDE_PX, MAX_SIDE_PX = 16, 32, 1024


def parse_size(size: str) -> tuple[int, int]:
    """Width and height in pixels from WIDTHxHEIGHT.

    Raises:
        InvalidRequest: It is not written so, or a side is too small, too large or uneven.
    """
    found = re.fullmatch(r"(\d+)x(\d+)", size)
    if found is None or not all(
        MIN_SIDE_PX <= int(side) <= MAX_SIDE_PX and int(side) % SIDE_STEP_PX == 0
        for side in found.groups()
    ):
        raise InvalidRequest(
            f"size {size!r}: give WIDTHxHEIGHT, multiples of {SIDE_STEP_PX} from {MIN_SIDE_PX} "
            f"to {MAX_SIDE_PX}"
        )
    return int(found[1]), int(found[2])


def _check_sizes(sizes: dict[str, float]) -> dict[str, float]:
    for size in sizes:
        parse_size(size)
    return _check_shares(sizes)


def _check_categories(shares: dict[str, float]) -> dict[str, float]:
    unknown = [name for name in shares if name not in OPERATORS]
    if unknown:
        raise ValueError(f"category {unknown[0]!r} is unknown: give some of {', '.join(OPERATORS)}")
    return _check_shares(shares)


def _check_shares(shares: dict[str, float]) -> dict[str, float]:
    if min(shares.values(), default=0) < 0 or sum(shares.values()) <= 0:
        raise ValueError(f"shares {shares}: none may be negative, and one must be above 0")
    return shares


VARIETIES = {"full": EVERYTHING, "plain": PLAIN}


def _named_variety(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value not in VARIETIES:
        raise ValueError(f"{value!r} is unknown: give `full` or `plain`, or the shares")
    return VARIETIES[value]


class Settings(BaseModel):
    """What every settings class is: strict about its keys, and fixed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _name_the_nearest_key(cls, values: Any) -> Any:
        """Refuse an unknown key with the one that was probably meant."""
        known = cls.model_fields
        unknown = [name for name in values if name not in known] if isinstance(values, dict) else []
        if unknown:
            raise ValueError(unknown_name(unknown[0], known))
        return values


class StreamSettings(Settings):
    """What the engine draws."""

    seed: int = Field(
        default=0, ge=0, description="first seed of the stream; another one is another stream"
    )
    sizes: Annotated[dict[str, float], AfterValidator(_check_sizes)] = Field(
        default={"128x128": 1.0}, description="WIDTHxHEIGHT in pixels → share of the batches"
    )
    shares: Annotated[dict[str, float], AfterValidator(_check_categories)] = Field(
        default=dict(DEFAULT_SHARES), description="edit category → share of the samples"
    )
    variety: Annotated[Variety, BeforeValidator(_named_variety)] = Field(
        default=EVERYTHING, description="`full`, `plain`, or the shares of `variety.Variety`"
    )


class DataConfig(StreamSettings):
    """One run of ``step1x data generate``."""

    out: Path = Field(description="folder of the shards")
    num: int = Field(gt=0, description="records")
    shard_size: int = Field(default=500, gt=0, description="records of a shard, all of one size")
    format: Format = "webdataset"
    engine: Literal["local", "ray"] = "local"
    num_workers: int = Field(
        default_factory=lambda: os.cpu_count() or 1, gt=0, description="processes; not for ray"
    )


def load_config(path: Path, **overrides: Any) -> DataConfig:
    """Read a data run's YAML.

    Args:
        path: The file.
        overrides: See `read_yaml`.

    Raises:
        InvalidRequest: The file cannot be read, or a key or value is wrong.
    """
    return read_yaml(path, DataConfig, **overrides)


def unknown_name(name: Any, known: Iterable[str]) -> str:
    """What is said of a key that is not known: the nearest one, or all that there are."""
    known = list(known)
    near = get_close_matches(str(name), known, 1)
    fix = f"did you mean {near[0]!r}?" if near else f"give some of {', '.join(known)}"
    return f"{name!r} is unknown: {fix}"


def first_problem(error: ValidationError) -> str:
    """The first of pydantic's complaints, with the setting that it is about, on one line."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"]) or "settings"
    return f"{name}: {first['msg'].removeprefix('Value error, ')}"


def given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in settings.items() if value is not None}


def read_yaml(path: Path, kind: Any, **overrides: Any) -> Any:
    """Read a YAML file of settings of `kind`, a settings class or a union of them.

    Args:
        path: The file.
        kind: What it holds.
        overrides: Settings that replace the file's; None leaves one as it is.

    Raises:
        InvalidRequest: The file cannot be read, or a key or value is wrong; one line.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise InvalidRequest(f"{path}: must hold settings, `name: value`")
        return TypeAdapter(kind).validate_python(values | given(overrides))
    except OSError as error:
        raise InvalidRequest(f"{path}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidRequest(f"{path}: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        raise InvalidRequest(f"{path}: {first_problem(error)}") from error
