import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from step1x_edit.datagen.config import DataConfig, load_config
from step1x_edit.datagen.generate import MANIFEST, generate, shard_paths
from step1x_edit.datagen.shards import read
from step1x_edit.errors import InvalidRequest


def config(out, **changes):
    settings = {"num": 22, "shard_size": 5, "sizes": {"48x32": 0.5, "32x48": 0.5}}
    return DataConfig(**{"out": out, "num_workers": 1, **settings, **changes})


def contents(folder):
    return {path.name: path.read_bytes() for path in shard_paths(folder)}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "set"
    summary = generate(config(folder))
    assert (summary.made, summary.found) == (22, 0)
    return contents(folder)


def test_every_record_is_there_once_and_shards_have_one_size(tmp_path, expected):
    seeds = []
    for name, content in expected.items():
        (tmp_path / name).write_bytes(content)
        triplets = list(read(tmp_path / name))
        assert len({triplet.mask.shape for triplet in triplets}) == 1
        seeds += [triplet.seed for triplet in triplets]
    assert seeds == list(range(22))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"num_workers": 2}, {"num_workers": 3}])
def test_the_number_of_workers_changes_nothing(changes, expected, tmp_path):
    generate(config(tmp_path / "set", **changes))
    assert contents(tmp_path / "set") == expected


def test_a_run_goes_on_with_what_is_missing(expected, tmp_path):
    folder = tmp_path / "set"
    generate(config(folder, num=12))
    names = sorted(contents(folder))
    (folder / names[0]).unlink()
    summary = generate(config(folder))
    assert (summary.made, summary.found) == (17, 5)  # the third shard held 2 of its 5
    assert summary.categories.total() == 22
    assert contents(folder) == expected


@pytest.mark.slow
def test_a_killed_run_is_gone_on_with(expected, tmp_path):
    folder = tmp_path / "set"
    run = config(folder, num=60, num_workers=2).model_dump(mode="json")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    command = [Path(sys.executable).with_name("step1x"), "data", "generate", path, "-q"]
    process = subprocess.Popen(command, start_new_session=True)
    while process.poll() is None and len(list(folder.glob("shard-*.json"))) < 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert subprocess.run(command, check=False).returncode == 0
    seeds = [triplet.seed for shard in shard_paths(folder) for triplet in read(shard)]
    assert seeds == list(range(60))
    assert not list(folder.glob("*.new"))


@pytest.mark.parametrize(("changes", "named"), [({"seed": 1}, "seed 0"), ({"shard_size": 4}, "5")])
def test_another_dataset_in_the_folder_is_refused(changes, named, tmp_path):
    generate(config(tmp_path / "set", num=5))
    before = contents(tmp_path / "set")
    with pytest.raises(InvalidRequest, match=named):
        generate(config(tmp_path / "set", **changes))
    assert contents(tmp_path / "set") == before


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("keep me")
    with pytest.raises(InvalidRequest, match="something else"):
        generate(config(tmp_path))
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(InvalidRequest, match="damaged"):
        generate(config(tmp_path))
    assert [path.name for path in sorted(tmp_path.iterdir())] == [MANIFEST, "letter.txt"]


def test_progress_ends_with_all(tmp_path):
    told = []
    generate(config(tmp_path / "set"), lambda done, total: told.append((done, total)))
    assert told[-1] == (22, 22)
    assert told == sorted(told)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("out: a\nnum: 5\nsizes: {12x8: 1}", "size '12x8'"),
        ("out: a\nnum: 5\nsizes: {big: 1}", "size 'big'"),
        ("out: a\nnum: 5\nsizes: {2048x64: 1}", "1024"),
        ("out: a\nnum: 5\nshares: {juggling: 1}", "'juggling' is unknown"),
        ("out: a\nnum: 5\nshares: {tone: 0}", "above 0"),
        ("out: a\nnum: 5\nshares: {tone: 1, colour: -1}", "negative"),
        ("out: a\nnum: 0", "num"),
        ("out: a\nnum: 5\nengine: spark", "engine"),
        ("out: a\nnum: 5\nworkers: 5", "workers"),
        ("num: 5", "out"),
        ("- 5", "must hold settings"),
        ("out: [", "run.yaml"),
    ],
)
def test_bad_settings_are_named_on_one_line(text, named, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(InvalidRequest) as caught:
        load_config(path)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_replace_the_files_settings(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({"out": "a", "num": 5, "seed": 3}))
    run = load_config(path, num=7, out=tmp_path, seed=None)
    assert (run.num, run.out, run.seed) == (7, tmp_path, 3)
