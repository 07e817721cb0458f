"""One file over HTTP, gone on with where it stopped, and checked to the last byte.

The hubs' own clients begin a broken-off file anew, which at 25 GB a file is hours. Called by `hub`
and, for small texts, by `constants`.
"""

import hashlib
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any, NamedTuple

from step1x_edit.checkpoints.contents import one_line
from step1x_edit.errors import CheckpointError, Step1XEditError

CHUNK_BYTES = 1 << 20
TIMEOUT_S = 30.0
ATTEMPTS = 5
"""In a row without a byte of progress."""
PAUSE_S = 1.0
"""Before the second attempt; each further one waits as long again."""

_PASSING = (408, 429, 500, 502, 503, 504)


class RemoteFile(NamedTuple):
    """A file of a repository and how its content is recognised."""

    path: str
    """In the repository."""
    size: int
    """In bytes."""
    url: str
    sha256: str = ""
    git_sha1: str = ""
    """Of a file that git itself holds; the hub tells no other digest of those."""


class _Interrupted(Exception):
    """The connection broke, or the server asks for patience."""


def download(
    file: RemoteFile,
    target: Path,
    *,
    headers: Mapping[str, str] | None = None,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> None:
    """Fetch a file; what an earlier try has left in ``TARGET.part`` is not fetched again.

    Args:
        file: What to fetch.
        target: Written, folders included, when the content has been found right.
        headers: Sent to the file's own server, and not to where that redirects.
        on_bytes: Called with the number of bytes that each chunk brings nearer.

    Raises:
        Step1XEditError: The server refuses, or the connection keeps breaking; the part is kept.
        CheckpointError: The content is not the file's; the part is removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    if part.exists() and part.stat().st_size > file.size:
        part.unlink()
    digest = _digest(file)
    failures = 0
    with part.open("a+b") as opened:
        opened.seek(0)
        while known := opened.read(CHUNK_BYTES):
            digest.update(known)
            on_bytes(len(known))
        while (have := opened.tell()) < file.size:
            try:
                with closing(_open(file.url, headers or {}, start=have)) as response:
                    if have and response.status != 206:  # it sends the whole file
                        opened.seek(0)
                        opened.truncate()
                        digest = _digest(file)
                        on_bytes(-have)
                    for chunk in _chunks(response):
                        opened.write(chunk)
                        digest.update(chunk)
                        on_bytes(len(chunk))
                        failures = 0
                if opened.tell() < file.size:
                    raise _Interrupted("the connection was closed early")
            except _Interrupted as error:
                failures += 1
                if failures == ATTEMPTS:
                    raise Step1XEditError(
                        f"{file.path} broke off {ATTEMPTS} times at {opened.tell():,} of "
                        f"{file.size:,} bytes ({error}): run this again, it goes on from there"
                    ) from error
                time.sleep(PAUSE_S * failures)
    try:
        check_digest(file, part.stat().st_size, digest.hexdigest())
    except CheckpointError:
        part.unlink()
        raise
    part.replace(target)


def check_file(file: RemoteFile, path: Path, on_bytes: Callable[[int], None]) -> None:
    """Compare a file on the disk with what the repository says of it.

    Raises:
        CheckpointError: It has another size or another content; which, by name.
    """
    digest = _digest(file)
    with path.open("rb") as opened:
        while chunk := opened.read(CHUNK_BYTES):
            digest.update(chunk)
            on_bytes(len(chunk))
    check_digest(file, path.stat().st_size, digest.hexdigest())


def check_digest(file: RemoteFile, size: int, digest: str) -> None:
    """Refuse content of another size or digest.

    Raises:
        CheckpointError: With both values.
    """
    if size != file.size:
        raise CheckpointError(
            f"{file.path} has {size:,} bytes, not {file.size:,}: it is damaged, fetch it again"
        )
    wanted = file.sha256 or file.git_sha1
    if digest != wanted:
        kind = "SHA-256" if file.sha256 else "git SHA-1"
        raise CheckpointError(
            f"{file.path} is damaged: its {kind} is {digest}, not {wanted}: fetch it again"
        )


def read_url(url: str, *, limit_bytes: int = 1 << 24) -> bytes:
    """The whole of something small.

    Raises:
        Step1XEditError: The server refuses or cannot be reached, or it is more than the limit.
    """
    try:
        with closing(_open(url, {}, start=0)) as response:
            content = response.read(limit_bytes + 1)
    except (_Interrupted, HTTPException, OSError) as error:
        raise Step1XEditError(f"{url} cannot be fetched: {one_line(error)}") from error
    if len(content) > limit_bytes:
        raise Step1XEditError(f"{url} is over {limit_bytes:,} bytes: it is not what it should be")
    return content


def _digest(file: RemoteFile) -> Any:
    if file.sha256:
        return hashlib.sha256()
    # How git names a file: of its length and its content.
    return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)


def _open(url: str, headers: Mapping[str, str], *, start: int) -> HTTPResponse:
    request = urllib.request.Request(url, headers={"User-Agent": "step1x-edit"})
    for name, value in headers.items():
        request.add_unredirected_header(name, value)
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code in _PASSING:
            raise _Interrupted(f"HTTP {error.code} {error.reason}") from error
        hint = ": `hf auth login` may help" if error.code in (401, 403) else ""
        raise Step1XEditError(
            f"{url} cannot be fetched: HTTP {error.code} {error.reason}{hint}"
        ) from error
    except (OSError, HTTPException) as error:
        raise _Interrupted(one_line(error)) from error


def _chunks(response: HTTPResponse) -> Iterator[bytes]:
    """The body as it comes; a failure of the network is told from one of the disk."""
    while True:
        try:
            chunk = response.read1(CHUNK_BYTES)
        except (OSError, HTTPException) as error:
            raise _Interrupted(one_line(error)) from error
        if not chunk:
            return
        yield chunk
