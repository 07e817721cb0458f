"""Ray makes what one process makes, whoever is killed in the middle. Each run is a real command."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from step1x_edit.datagen.config import DataConfig
from step1x_edit.datagen.generate import generate, shard_paths
from step1x_edit.datagen.shards import read

pytest.importorskip("ray")
pytestmark = pytest.mark.slow

SHARDS, SHARD_SIZE = 16, 15
WORKING = "ray::make_shard"
"""What Ray calls a worker process while it makes a shard."""


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Shard name → bytes, as one process makes them."""
    folder = tmp_path_factory.mktemp("data") / "set"
    generate(DataConfig(out=folder, num_workers=1, **settings()))
    return contents(folder)


def settings():
    return {"num": SHARDS * SHARD_SIZE, "shard_size": SHARD_SIZE, "sizes": {"64x64": 1.0}}


def contents(folder):
    return {path.name: path.read_bytes() for path in shard_paths(folder)}


@pytest.fixture
def start(tmp_path):
    """Start the command; each run is a session of its own, and all of it ends with the test."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"out": str(tmp_path / "set"), "engine": "ray"} | settings()))
    command = [Path(sys.executable).with_name("step1x"), "data", "generate", path, "-q"]
    # Ray's workers stand back for every other process: on a busy machine they would take minutes.
    environment = os.environ | {"RAY_worker_niceness": "0"}
    started = []

    def begin():
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, env=environment, start_new_session=True, stdout=pipe, stderr=pipe, text=True
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        for pid in processes(process):
            end(pid)
        process.communicate()


def processes(driver, named=""):
    """The processes of a driver's session, those that outlived it too, by a part of their name."""
    command = ["ps", "-o", "pid=,args=", "-s", str(driver.pid)]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if named in line]


def end(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def wait_until_in_the_middle(driver, folder):
    """Until some shards are done, more are not, and a worker is at one."""
    while driver.poll() is None:
        done = len(list(folder.glob("shard-*.json")))
        assert done < SHARDS - 2, "too late"
        if done >= 2 and list(folder.glob("*.new")) and (working := processes(driver, WORKING)):
            return working
        time.sleep(0.01)
    raise AssertionError(f"the run ended too early: {driver.communicate()[1]}")


def assert_complete(folder, expected):
    assert contents(folder) == expected
    seeds = [triplet.seed for shard in shard_paths(folder) for triplet in read(shard)]
    assert seeds == list(range(SHARDS * SHARD_SIZE))
    others = {path.name for path in folder.iterdir()} - set(expected)
    assert others == {"dataset.json", *(name.replace(".tar", ".json") for name in expected)}


def test_a_killed_worker_loses_and_doubles_nothing(start, expected, tmp_path):
    driver = start()
    for pid in wait_until_in_the_middle(driver, tmp_path / "set"):
        end(pid)
    _, errors = driver.communicate()
    assert driver.returncode == 0, errors
    assert_complete(tmp_path / "set", expected)


def test_a_killed_driver_loses_and_doubles_nothing(start, expected, tmp_path):
    first = start()
    wait_until_in_the_middle(first, tmp_path / "set")
    first.kill()
    # At once, while workers of the killed driver may still write.
    second = start()
    _, errors = second.communicate()
    assert second.returncode == 0, errors
    assert_complete(tmp_path / "set", expected)
