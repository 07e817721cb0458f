"""One file over a connection that breaks, spoils and refuses."""

from __future__ import annotations

import hashlib
import random

import pytest

from step1x_edit.checkpoints import download as module
from step1x_edit.checkpoints.download import RemoteFile, download, read_url
from step1x_edit.errors import CheckpointError, Step1XEditError

from ..file_server import Site, serving

CONTENT = random.Random(0).randbytes(3_000_000)
NAME = "o/r/big.safetensors"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(module, "PAUSE_S", 0.0)


@pytest.fixture
def site():
    with serving(Site({NAME: CONTENT})) as served:
        yield served


def remote(site, content=CONTENT, **changes):
    sha256 = hashlib.sha256(content).hexdigest()
    values = {"path": "big.safetensors", "size": len(content), "url": f"{site.url}/{NAME}"}
    return RemoteFile(**values | {"sha256": sha256} | changes)


def test_broken_connections_are_gone_on_with_in_one_call(site, tmp_path):
    site.break_after = [1_000_000, 500_000]
    counted = []
    download(remote(site), tmp_path / "deep" / "big", on_bytes=counted.append)
    assert (tmp_path / "deep" / "big").read_bytes() == CONTENT
    assert [asked for _, asked in site.requests] == [None, "bytes=1000000-", "bytes=1500000-"]
    assert sum(counted) == len(CONTENT)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["big"]


def test_a_later_run_goes_on_where_the_first_gave_up(site, tmp_path, monkeypatch):
    site.break_after = [1_200_000]
    monkeypatch.setattr(module, "ATTEMPTS", 1)
    with pytest.raises(Step1XEditError, match=r"broke off 1 times at 1,200,000 of 3,000,000") as e:
        download(remote(site), tmp_path / "big")
    assert "\n" not in str(e.value)
    assert not (tmp_path / "big").exists()
    assert (tmp_path / "big.part").read_bytes() == CONTENT[:1_200_000]
    download(remote(site), tmp_path / "big")
    assert site.requests[-1] == (NAME, "bytes=1200000-")
    assert len(site.requests) == 2
    assert (tmp_path / "big").read_bytes() == CONTENT


def test_a_server_without_ranges_sends_it_anew(site, tmp_path):
    site.break_after = [1_000_000]
    site.ignore_range = True
    counted = []
    download(remote(site), tmp_path / "big", on_bytes=counted.append)
    assert (tmp_path / "big").read_bytes() == CONTENT
    assert sum(counted) == len(CONTENT)


def test_a_flipped_byte_is_found_and_named(site, tmp_path):
    site.flip = {NAME}
    with pytest.raises(CheckpointError, match=r"big\.safetensors is damaged: its SHA-256 is") as e:
        download(remote(site), tmp_path / "big")
    assert hashlib.sha256(CONTENT).hexdigest() in str(e.value)
    assert "\n" not in str(e.value)
    assert not list(tmp_path.iterdir())


def test_a_flipped_byte_in_the_part_on_the_disk_is_found_too(site, tmp_path):
    (tmp_path / "big.part").write_bytes(bytes([CONTENT[0] ^ 1]) + CONTENT[1:1000])
    with pytest.raises(CheckpointError, match="is damaged"):
        download(remote(site), tmp_path / "big")
    download(remote(site), tmp_path / "big")
    assert (tmp_path / "big").read_bytes() == CONTENT


def test_files_that_git_holds_are_checked_by_its_digest(site, tmp_path):
    blob = hashlib.sha1(b"blob %d\0" % len(CONTENT) + CONTENT).hexdigest()
    download(remote(site, sha256="", git_sha1=blob), tmp_path / "big")
    with pytest.raises(CheckpointError, match="git SHA-1"):
        download(remote(site, sha256="", git_sha1="0" * 40), tmp_path / "other")


def test_a_file_that_is_shorter_than_announced_breaks_off(site, tmp_path):
    with pytest.raises(Step1XEditError, match="broke off 5 times at 3,000,000 of 3,000,007"):
        download(remote(site, size=len(CONTENT) + 7), tmp_path / "big")


def test_refusals_are_one_line(site, tmp_path):
    with pytest.raises(Step1XEditError, match=r"none cannot be fetched: HTTP 404"):
        download(remote(site, url=f"{site.url}/o/r/none"), tmp_path / "big")
    with pytest.raises(Step1XEditError, match="cannot be fetched"):
        read_url("http://127.0.0.1:9/nobody")
    with pytest.raises(Step1XEditError, match="over 1,000 bytes"):
        read_url(f"{site.url}/{NAME}", limit_bytes=1000)
