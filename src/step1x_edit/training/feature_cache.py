"""Latents and instruction features on disk: what the frozen networks say, made once.

An entry is a small safetensors file whose name is the hash of all that decides what is in it:
picture, size, sentence, the networks and their settings. What changes gets another name, so nothing
stale is ever read, and any number of runs and processes share one folder. Filled and read by
`feature_batches`.
"""

import errno
import hashlib
import json
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import safetensors.torch
from torch import Tensor, nn

from step1x_edit.errors import Step1XEditError
from step1x_edit.model.pipeline import Step1XEditPipeline
from step1x_edit.runtime.disk import fingerprint_of, sample_of

FORMAT = 1
"""Of the entries; another one is another name."""
UNFINISHED = ".partial"
ABANDONED_S = 3600
"""A half-written entry that is older was left by a process that was killed."""
_CHECKSUM = "crc32"
_LENGTH_BYTES = 8  # of the number before a safetensors header
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class FeatureCache:
    """A folder of entries.

    Args:
        folder: Made with the first entry.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """Where the entry of a key is; 256 folders, as some file systems are slow in full ones."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def holds(self, key: str) -> bool:
        """Whether an entry is there and as long as its header says; reads the header only."""
        try:
            with self.path(key).open("rb") as file:
                start, header = _header(file.read(_LENGTH_BYTES), file.read)
                size = file.seek(0, 2)
            tensors = header.keys() - {"__metadata__"}
            return size == start + max(header[name]["data_offsets"][1] for name in tensors)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def num_rows(self, key: str, name: str) -> int:
        """Rows of a tensor of an entry, by its header.

        Raises:
            Step1XEditError: As of `read`.
        """
        try:
            with self.path(key).open("rb") as file:
                return _header(file.read(_LENGTH_BYTES), file.read)[1][name]["shape"][0]
        except (OSError, ValueError, KeyError):
            return len(self.read(key)[name])

    def read(self, key: str) -> dict[str, Tensor]:
        """The tensors of an entry.

        Raises:
            Step1XEditError: It is gone or damaged; then it is deleted, and filling makes it again.
        """
        path = self.path(key)
        try:
            content = path.read_bytes()
            start, header = _header(content[:8], lambda size: content[8 : 8 + size])
            if header["__metadata__"][_CHECKSUM] != _checksum(content, start):
                raise ValueError("its checksum is wrong")
            return safetensors.torch.load(content)
        except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
            path.unlink(missing_ok=True)
            raise Step1XEditError(
                f"{path} is damaged or gone ({' '.join(str(error).split())}): start again, which "
                "makes it anew"
            ) from error

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep an entry; it appears whole or not at all.

        Raises:
            Step1XEditError: The disk is full, or the folder cannot be written.
        """
        path = self.path(key)
        own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        content = safetensors.torch.save(own)
        start, _ = _header(content[:8], lambda size: content[8 : 8 + size])
        content = safetensors.torch.save(own, {_CHECKSUM: _checksum(content, start)})
        # A name of its own: another process may be writing the same entry.
        beside = path.with_name(f"{key}.{uuid4().hex}{UNFINISHED}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(content)
            beside.replace(path)
        except OSError as error:
            full = error.errno in _NO_ROOM
            fix = "make room, or give another cache" if full else "give another cache"
            raise Step1XEditError(
                f"{self.folder} cannot be written ({error.strerror}): {fix}; what is there is kept"
            ) from error
        finally:
            beside.unlink(missing_ok=True)

    def remove_abandoned(self) -> None:
        """Delete what killed processes left half-written; living ones keep theirs."""
        oldest = time.time() - ABANDONED_S
        for path in self.folder.glob(f"??/*{UNFINISHED}"):
            try:
                if path.stat().st_mtime < oldest:
                    path.unlink()
            except FileNotFoundError:  # finished or deleted meanwhile
                continue


class FeatureKeys:
    """Names of entries of one model.

    Networks are recognised by class, settings, and of each tensor its name, precision, shape and
    some thousand evenly spaced values: training changes all of a tensor, and reading 16 GB to its
    last byte would take longer than many a run's features.

    Args:
        pipeline: The model; not kept.
    """

    def __init__(self, pipeline: Step1XEditPipeline) -> None:
        vae_settings = json.dumps(_plain(dict(pipeline.vae.config)), sort_keys=True, default=str)
        self.vae = _identity(pipeline.vae, vae_settings)
        processor: Any = pipeline.processor
        self.reading = _identity(
            pipeline.text_encoder,
            json.dumps(_plain(pipeline.text_encoder.config.to_dict()), sort_keys=True, default=str),
            pipeline.instruction.model_dump_json(),
            processor.chat_template,
            processor.tokenizer.backend_tokenizer.to_str(),
            processor.image_processor.to_json_string(),
        )

    def latents(self, sha256: str, size: tuple[int, int], mask_sha256: str | None = None) -> str:
        """Name of a picture's tokens, with the changed share of each where there is a mask."""
        return _hashed(["latents", FORMAT, self.vae, sha256, size, mask_sha256])

    def features(self, sha256: str | None, size: tuple[int, int], sentence: str) -> str:
        """Name of the features of a sentence and its picture; None for text to image."""
        return _hashed(
            ["features", FORMAT, self.reading, sha256, size if sha256 else None, sentence]
        )


def _identity(module: nn.Module, *settings: str) -> str:
    digest = hashlib.sha256(type(module).__name__.encode())
    for text in settings:
        digest.update(hashlib.sha256(text.encode()).digest())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(sample_of(tensor))
    digest.update(fingerprint_of(module).encode())
    return digest.hexdigest()


def _plain(values: Any) -> Any:
    """Settings without what says where and by which version they were read."""
    if not isinstance(values, dict):
        return values
    return {
        name: _plain(value)
        for name, value in values.items()
        if not str(name).startswith("_") and name not in ("transformers_version", "dtype")
    }


def _hashed(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _header(length: bytes, read: Any) -> tuple[int, dict[str, Any]]:
    """Where the data of a safetensors file begins, and its header.

    Raises:
        ValueError: It is none.
    """
    size = int.from_bytes(length, "little")
    header = json.loads(read(size)) if len(length) == _LENGTH_BYTES and size < 1 << 20 else None
    if not isinstance(header, dict) or not header.keys() - {"__metadata__"}:
        raise ValueError("no safetensors header")
    return _LENGTH_BYTES + size, header


def _checksum(content: bytes, start: int) -> str:
    return f"{zlib.crc32(memoryview(content)[start:]):08x}"
