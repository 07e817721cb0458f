"""Which pairs a model is trained on: the settings of the datasets, and the released trainer's TOML.

Part of a run's settings (`config`); `pairs` checks what is named here, `feature_batches` makes
batches of it.
"""

import logging
import math
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from platformdirs import user_cache_path
from pydantic import Field, ValidationError, model_validator

from step1x_edit.datagen.config import Settings, StreamSettings, first_problem, unknown_name
from step1x_edit.errors import InvalidRequest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

logger = logging.getLogger(__name__)


class StoredPairs(Settings):
    """What every dataset on disk has."""

    repeats: int = Field(default=1, ge=1, description="times that an epoch shows each example")
    size_level_px: int | None = Field(
        default=None, ge=32, le=4096, description="instead of that of all datasets"
    )
    batch_size: int | None = Field(
        default=None, gt=0, description="instead of that of all datasets"
    )
    text_to_image: bool = Field(
        default=False, description="draw the targets from words alone; sources are not read"
    )

    def levels(self, common: int) -> list[int]:
        """The size levels of its pictures, where all datasets' is `common`."""
        return [self.size_level_px or common]


class MetadataPairs(StoredPairs):
    """A dataset as the released trainer reads it: pictures and one metadata JSON."""

    kind: Literal["metadata"]
    metadata_file: Path = Field(
        description='`{"TARGET": {"ref_image_path": "SOURCE", "caption": "INSTRUCTION"}}`'
    )
    image_dir: Path | None = Field(
        default=None, description="where relative paths begin; the JSON's folder by default"
    )


class FolderPairs(StoredPairs):
    """A folder of ``NAME.source.png``, ``NAME.target.png``, ``NAME.txt``.

    Or of ``source/NAME.png``, ``target/NAME.png``, ``target/NAME.txt``; of any kind of picture.
    """

    kind: Literal["folder"]
    folder: Path


class ShardPairs(StoredPairs):
    """Shards that ``step1x data`` wrote."""

    kind: Literal["shards"]
    folder: Path


class EnginePairs(StreamSettings):
    """Straight from the data engine's workers: endless, and never on disk."""

    kind: Literal["engine"]
    share: float = Field(
        default=1.0, gt=0, le=1, description="of the batches; all engines' are at most 1 together"
    )
    num_workers: int = Field(default=1, ge=0, description="processes that draw pictures")
    batch_size: int | None = Field(
        default=None, gt=0, description="instead of that of all datasets"
    )
    text_to_image: bool = Field(
        default=False,
        description="draw the targets from words alone; a batch that words cannot say is edited",
    )

    def levels(self, _: int) -> list[int]:
        """The size levels of its pictures, which are its own."""
        sides = [size.split("x") for size in self.sizes]
        return [round(math.sqrt(int(width) * int(height))) for width, height in sides]


Dataset = Annotated[
    MetadataPairs | FolderPairs | ShardPairs | EnginePairs, Field(discriminator="kind")
]


class PairData(Settings):
    """All that a run is trained on."""

    datasets: tuple[Dataset, ...] = Field(min_length=1)
    size_level_px: int = Field(
        default=512, ge=32, le=4096, description="pictures are scaled to about its square of pixels"
    )
    bucket_px: Literal[16, 32, 64] = Field(
        default=32, description="sides are multiples of it, so that pictures share their sizes"
    )
    batch_size: int = Field(default=1, gt=0, description="examples of a batch, all of one size")
    root: Path | None = Field(
        default=None, description="folder that no path of the data may lead out of"
    )
    cache: Path = Field(
        default_factory=lambda: user_cache_path("step1x-edit") / "features",
        description="folder of latents and instruction features; any number of runs may share it",
    )

    @property
    def heaviest(self) -> tuple[int, int]:
        """Size level and size of the batches with the most pixels."""
        found = [
            (level, dataset.batch_size or self.batch_size)
            for dataset in self.datasets
            for level in dataset.levels(self.size_level_px)
        ]
        return max(found, key=lambda batch: batch[0] ** 2 * batch[1])

    def at(self, size_level_px: int) -> "PairData":
        """The same with every picture at one size level."""
        sizes = {f"{size_level_px}x{size_level_px}": 1.0}
        datasets = tuple(
            dataset.model_copy(
                update={"sizes": sizes}
                if isinstance(dataset, EnginePairs)
                else {"size_level_px": None}
            )
            for dataset in self.datasets
        )
        return self.model_copy(update={"datasets": datasets, "size_level_px": size_level_px})

    @model_validator(mode="after")
    def _shares_leave_room(self) -> "PairData":
        shares = [dataset.share for dataset in self.datasets if isinstance(dataset, EnginePairs)]
        stored = len(shares) < len(self.datasets)
        if shares and stored and sum(shares) >= 1:
            raise ValueError(
                f"the engines' shares are {sum(shares):g} together, which leaves nothing of the "
                "batches to the other datasets: lower them"
            )
        if shares and not stored and not math.isclose(sum(shares), 1):
            raise ValueError(
                f"the engines' shares are {sum(shares):g} together and there is no other dataset: "
                "make them 1"
            )
        return self


GENERAL, DATASET, SUBSET = "[general]", "[[datasets]]", "[[datasets.subsets]]"
_READ = {
    DATASET: ("resolution", "batch_size", "edit_dataset", "bucket_reso_steps"),
    SUBSET: ("image_dir", "metadata_file", "num_repeats"),
}
_OTHERS = (
    *("alpha_mask", "bucket_no_upscale", "cache_info", "caption_dropout_every_n_epochs"),
    *("caption_dropout_rate", "caption_extension", "caption_prefix", "caption_separator"),
    *("caption_suffix", "caption_tag_dropout_rate", "class_tokens", "color_aug"),
    *("custom_attributes", "enable_bucket", "enable_wildcard", "face_crop_aug_range", "flip_aug"),
    *("is_reg", "keep_tokens", "keep_tokens_separator", "max_bucket_reso", "min_bucket_reso"),
    *("network_multiplier", "random_crop", "resize_interpolation", "secondary_separator"),
    *("shuffle_caption", "token_warmup_min", "token_warmup_step", "validation_seed"),
    *("validation_split",),
)
"""Other keys that the released trainer knows."""
_MEANINGLESS = ("caption_extension", "enable_bucket", "keep_tokens", "network_multiplier")
"""Of these, those that change nothing where captions are in the metadata and are not shuffled."""


def from_official_toml(path: Path) -> PairData:
    """Read the released trainer's dataset TOML.

    A key that it does not know is refused. One that it knows and that asks for something that is
    not done here (mirroring, shuffled captions, …) is named in a warning. `resolution` may be two
    sides: their product is the area that pictures are scaled to, in their own shape.

    Raises:
        InvalidRequest: The file cannot be read, or a key or value is wrong; one line.
    """
    tables = _read_toml(path)
    general = tables.get("general", {})
    datasets = tables.get("datasets", [])
    _check_keys(path, "the file", tables, ("general", "datasets"))
    _check_keys(path, GENERAL, general, (*_READ[DATASET], *_READ[SUBSET], *_OTHERS))
    found: list[dict[str, Any]] = []
    unused = _asked_in_vain(GENERAL, general)
    steps: set[int] = set()
    for table in _tables(path, DATASET, datasets):
        known = (*_READ[DATASET], *_READ[SUBSET], *_OTHERS)
        _check_keys(path, DATASET, table, (*known, "subsets"))
        unused += _asked_in_vain(DATASET, table)
        for subset in _tables(path, SUBSET, table.get("subsets", [])):
            _check_keys(path, SUBSET, subset, (*_READ[SUBSET], *_OTHERS))
            unused += _asked_in_vain(SUBSET, subset)
            values = general | {k: v for k, v in table.items() if k != "subsets"} | subset
            steps.add(values.get("bucket_reso_steps", 32))
            found.append(_dataset(path, values))
    if len(steps) > 1:
        raise InvalidRequest(
            f"{path}: bucket_reso_steps {', '.join(map(str, sorted(steps)))}: give one for all"
        )
    if unused:
        logger.warning("%s: left out, as it is not done here: %s", path, ", ".join(unused))
    try:
        return PairData.model_validate({"datasets": found, "bucket_px": (*steps, 32)[0]})
    except ValidationError as error:
        raise InvalidRequest(f"{path}: {first_problem(error)}") from error


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequest(f"{path}: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidRequest(f"{path}: {error}") from error


def _tables(path: Path, name: str, values: Any) -> list[dict[str, Any]]:
    if not isinstance(values, list) or not values:
        raise InvalidRequest(f"{path} has no {name}: give at least one")
    return values


def _check_keys(path: Path, where: str, table: Any, known: tuple[str, ...]) -> None:
    if not isinstance(table, dict):
        raise InvalidRequest(f"{path}: {where} {table!r}: must be a table of `name = value`")
    for name in table:
        if name not in known:
            raise InvalidRequest(f"{path}: {where}: {unknown_name(name, known)}")


def _asked_in_vain(where: str, table: dict[str, Any]) -> list[str]:
    """Settings that are on and that nothing here follows."""
    return [
        f"{where} {name} = {value}"
        for name, value in table.items()
        if name in _OTHERS and name not in _MEANINGLESS and value
    ]


def _dataset(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """One subset as a `MetadataPairs`."""
    for name in ("resolution", "edit_dataset", "metadata_file"):
        if name not in values:
            where = SUBSET if name in _READ[SUBSET] else DATASET
            raise InvalidRequest(f"{path}: {where} has no {name}: give it")
    if not isinstance(values["edit_dataset"], bool):
        raise InvalidRequest(f"{path}: edit_dataset {values['edit_dataset']!r}: give true or false")
    return {
        "kind": "metadata",
        "metadata_file": values["metadata_file"],
        "image_dir": values.get("image_dir"),
        "repeats": values.get("num_repeats", 1),
        "batch_size": values.get("batch_size", 1),
        "size_level_px": _size_level(path, values["resolution"]),
        "text_to_image": not values["edit_dataset"],
    }


def _size_level(path: Path, resolution: Any) -> int:
    sides = resolution if isinstance(resolution, list) else [resolution]
    if len(sides) not in (1, 2) or not all(type(side) is int and side > 0 for side in sides):
        raise InvalidRequest(
            f"{path}: resolution {resolution!r}: give a side in pixels, or [width, height]"
        )
    return round(math.sqrt(sides[0] * sides[-1]))
