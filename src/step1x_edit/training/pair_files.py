"""What datasets on disk hold, and whether it can be read: one function a kind of dataset.

`pairs.check` calls them, the looking at pictures in processes of its own; so nothing here imports
torch.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from step1x_edit.datagen.shards import PARTS, decode, read_parts
from step1x_edit.errors import InvalidRequest
from step1x_edit.images import SAVE_SUFFIXES, open_picture

SOURCE, TARGET, MASK, WORDS = PARTS
SUFFIXES = SAVE_SUFFIXES
"""Of the pictures that are looked for where a dataset names none."""


@dataclass(frozen=True)
class Listed:
    """An example as its dataset lists it, before any picture is opened.

    Attributes:
        name: What messages call it.
        target: File of the wanted picture.
        source: File of the picture to edit; None for text to image.
        sentence: The instruction.
    """

    name: str
    target: Path
    source: Path | None
    sentence: str


@dataclass(frozen=True)
class StoredPicture:
    """Where a picture is, and what it was when it was looked at.

    Attributes:
        file: Picture file, or shard.
        sha256: Of its bytes.
        record: Number in the shard; None for a file of its own.
        part: Which of the record's.
    """

    file: Path
    sha256: str
    record: int | None = None
    part: str = ""

    def open(self) -> Image.Image:
        """The picture as a model is shown it, RGB.

        Raises:
            InvalidRequest: It can no longer be read, or is another one now.
        """
        if self.record is None:
            picture = open_picture(self.file)
            image, digest = picture.on_white, picture.sha256
        else:
            content = _records(self.file)[self.record][self.part]
            digest = hashlib.sha256(content).hexdigest()
            image = Image.open(io.BytesIO(content)).convert("RGB")
        if digest != self.sha256:
            raise InvalidRequest(f"{self.file} was changed since it was checked: start again")
        return image


@dataclass(frozen=True)
class SeenPicture:
    """What a look at a picture file told."""

    sha256: str
    size: tuple[int, int]


@dataclass(frozen=True)
class SeenRecord:
    """What a look at a record of a shard told.

    Attributes:
        key: Its name.
        sha256: Of each part.
        size: Width and height in pixels.
        instructions: Language → instruction.
        captions: Language → what the target shows.
    """

    key: str
    sha256: Mapping[str, str]
    size: tuple[int, int]
    instructions: Mapping[str, str]
    captions: Mapping[str, str]


def list_metadata(
    metadata_file: Path, image_dir: Path | None, *, text_to_image: bool
) -> Iterator[Listed | str]:
    """The examples of a metadata JSON, and in their place what is wrong with the others.

    Args:
        metadata_file: ``{"TARGET": {"ref_image_path": …, "caption": …}}``. Other keys of an example
            have no meaning here; one without a ``ref_image_path`` is text to image.
        image_dir: Where relative paths begin. What is not there is looked for in the working
            directory, and a target without a suffix with each kind of picture's.
        text_to_image: Leave the sources out.

    Raises:
        InvalidRequest: The file cannot be read, or is no JSON object.
    """
    folder = image_dir or metadata_file.parent
    for target, entry in _read_object(metadata_file).items():
        name = f"{metadata_file}: {target!r}"
        if not isinstance(entry, dict):
            yield f"{name} is {_kind(entry)}: must be an object with a caption"
            continue
        caption, source = entry.get("caption"), entry.get("ref_image_path")
        if not isinstance(caption, str) or not caption.strip():
            said = "is missing" if caption is None else f"is {_kind(caption)}"
            yield f"{name}: the caption {said}: must be a sentence"
        elif source is not None and not isinstance(source, str):
            yield f"{name}: ref_image_path is {_kind(source)}: must be a path"
        elif "\0" in target + (source or ""):
            yield f"{name}: a path holds the character 0: correct it"
        else:
            drawn = text_to_image or source is None
            reference = None if drawn else _placed(str(source), folder)
            yield Listed(target, _placed(target, folder), reference, caption)


def list_folder(folder: Path, *, text_to_image: bool) -> Iterator[Listed | str]:
    """The examples of a folder of pairs, by name, and in their place what others lack.

    Args:
        folder: See `data_config.FolderPairs`.
        text_to_image: Leave the sources out.

    Raises:
        InvalidRequest: It is no folder.
    """
    if not folder.is_dir():
        raise InvalidRequest(f"{folder} is no folder: give one of pairs of pictures")
    apart = (folder / "target").is_dir()
    files: dict[tuple[str, str], Path] = {}
    for path in sorted(folder.glob("*/*" if apart else "*")):
        # `NAME.source.png` and `source/NAME.png` are both (NAME, source).
        name, dot, part = (path.stem, ".", path.parent.name) if apart else path.stem.rpartition(".")
        if path.suffix == ".txt" and (path.parent.name == "target" or not apart):
            files[path.stem, "words"] = path
        elif path.suffix.lower() in SUFFIXES and dot and part in ("source", "target"):
            if (name, part) in files:
                yield f"{path} and {files[name, part].name}: two {part}s of {name!r}: remove one"
            files[name, part] = path
    for name in sorted({name for name, _ in files}):
        target, source, words = (files.get((name, part)) for part in ("target", "source", "words"))
        where = f"{folder}: {name!r}"
        if target is None:
            yield f"{where} has no target picture: add it, or remove the rest of {name!r}"
        elif source is None and not text_to_image:
            yield f"{where} has no source picture: add it, or remove the rest of {name!r}"
        elif words is None:
            yield f"{where} has no instruction: write it to {target.parent / name}.txt"
        else:
            sentence = _read_words(words)
            if sentence is None:
                yield f"{words} holds no sentence in UTF-8: write the instruction there"
            else:
                yield Listed(str(target), target, None if text_to_image else source, sentence)


def look_at_picture(path: Path) -> SeenPicture | str:
    """Decode a picture; what is wrong with it where that fails."""
    try:
        picture = open_picture(path)
    except InvalidRequest as error:
        return str(error)
    return SeenPicture(picture.sha256, picture.size)


def look_at_shard(path: Path) -> list[SeenRecord] | str:
    """Decode all records of a shard; what is wrong with it where that fails."""
    try:
        return [_seen(parts, path) for parts in read_parts(path)]
    except InvalidRequest as error:
        return str(error)
    except OSError as error:
        return f"{path} cannot be read ({error.strerror}): check the path"


def _seen(parts: dict[str, bytes], path: Path) -> SeenRecord:
    triplet = decode(parts, path)
    height, width, _ = triplet.source.shape
    if triplet.target.shape != triplet.source.shape or triplet.mask.shape != (height, width):
        raise InvalidRequest(
            f"{path}: record {triplet.key}: source of {width} × {height} px, target of "
            f"{triplet.target.shape[1]} × {triplet.target.shape[0]} px: must be of one size"
        )
    return SeenRecord(
        triplet.key,
        {name: hashlib.sha256(parts[name]).hexdigest() for name in (SOURCE, TARGET, MASK)},
        (width, height),
        triplet.instructions,
        triplet.captions,
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"{path}: line {error.lineno}, column {error.colno}: {error.msg}: correct the JSON"
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path} is not UTF-8 ({error.reason}): save it as UTF-8") from error
    except OSError as error:
        raise InvalidRequest(f"{path}: {error.strerror}: check the path") from error
    if not isinstance(values, dict):
        raise InvalidRequest(f"{path} holds {_kind(values)}: must be an object, target → example")
    return values


def _kind(value: Any) -> str:
    """What JSON calls a value."""
    names = {dict: "an object", list: "a list", str: "an empty text", bool: "a truth value"}
    return "null" if value is None else names.get(type(value), f"the number {value}")


def _placed(text: str, folder: Path) -> Path:
    """The file that a metadata file's path means."""
    for path in (folder / text, Path(text)):
        for candidate in (path, *(Path(f"{path}{suffix}") for suffix in SUFFIXES)):
            try:
                if candidate.is_file():
                    return candidate
            except OSError:  # a name of thousands of letters
                return path
    return folder / text


def _read_words(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8-sig").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


@lru_cache(maxsize=1)
def _records(path: Path) -> list[dict[str, bytes]]:
    return list(read_parts(path))
