"""Every bad input of ``step1x data``, through the installed command: one line and no harm."""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
import sys

import pytest

from step1x_edit.datagen.atlas import ATLAS_DIR

from .command import STEP1X, files_of, refused, run

CONFIG = "out: made\nnum: 12\nshard_size: 6\nsizes: {48x32: 1}\nnum_workers: 1\n"
DRAWN = "shares: {removal: 1}\n"


@pytest.fixture
def here(tmp_path):
    (tmp_path / "run.yaml").write_text(CONFIG)
    return tmp_path


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A folder that holds a dataset of two shards, ``made``."""
    folder = tmp_path_factory.mktemp("dataset")
    (folder / "run.yaml").write_text(CONFIG + DRAWN)
    assert run(folder, ["data", "generate", "run.yaml", "-q"]).returncode == 0
    return folder


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "must hold settings"),
        ("out: [", "run.yaml"),
        (CONFIG + "shard: 3\n", "shard"),
        (CONFIG.replace("12", "0"), "num"),
        (CONFIG.replace("48x32", "50x32"), "50x32.*multiples of 16"),
        (CONFIG + "shares: {colours: 1}\n", "colours.*give some of"),
        (CONFIG + "variety: {counts: 2}\n", "counts.*less than or equal to 1"),
        (CONFIG + "variety: rich\n", "variety.*`full` or `plain`"),
    ],
)
def test_bad_config(here, text, says):
    (here / "run.yaml").write_text(text)
    refused(here, ["data", "generate", "run.yaml"], "run.yaml", says)


def test_missing_config(here):
    refused(here, ["data", "generate", "other.yaml"], "other.yaml", "No such file")


@pytest.mark.parametrize("command", ["filter", "export", "inspect"])
def test_folder_without_a_dataset(here, command):
    (here / "empty").mkdir()
    out = [] if command == "inspect" else ["--out", "other"]
    refused(here, ["data", command, "empty", *out], "empty holds no shards", "data generate")


@pytest.mark.parametrize("command", ["filter", "export", "inspect"])
def test_damaged_shard(dataset, here, command):
    shutil.copytree(dataset / "made", here / "made")
    shard = here / "made" / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-10240])
    out = [] if command == "inspect" else ["--out", "other"]
    done = run(here, ["data", command, "made", *out, "-q"])
    assert done.returncode == 2
    assert re.fullmatch(r"step1x: .*shard-000001.tar is damaged.*: delete it.*\n", done.stderr)
    assert not (here / "made" / "inspect.html").exists()


def test_missing_art(here):
    """An installation whose atlas lost a file names it."""
    atlas = here / "atlas"
    shutil.copytree(ATLAS_DIR, atlas)
    for sprite in (atlas / "objects").iterdir():
        sprite.unlink()
    (here / "run.yaml").write_text(CONFIG + DRAWN)
    done = subprocess.run(
        [sys.executable, "-c", WITH_ATLAS, str(atlas), "data", "generate", "run.yaml"],
        cwd=here, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert re.fullmatch(r"step1x: .*objects/\w+\.webp is missing.*install.*\n", done.stderr)
    assert not list(here.glob("made/shard*"))


WITH_ATLAS = """
import sys
from pathlib import Path
from step1x_edit.apps import cli
from step1x_edit.datagen import atlas, generate
folder = Path(sys.argv.pop(1))
generate._atlas = lambda: atlas.Atlas(folder)
generate._locally = lambda config, missing: (generate.make_shard(config, n) for n in missing)
sys.exit(cli.run(sys.argv[1:]))
"""


def test_full_disk(here):
    """A limit on the size of files fails a write in the middle, as a full disk does."""
    done = subprocess.run(
        [str(STEP1X), "data", "generate", "run.yaml"],
        cwd=here, capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert re.fullmatch(r"step1x: no room on the disk .*\n", done.stderr)
    assert set(files_of(here)) == {"run.yaml", "made/dataset.json"}
    again = run(here, ["data", "generate", "run.yaml"])
    assert again.returncode == 0, again.stderr
    assert "12 records made" in again.stdout
