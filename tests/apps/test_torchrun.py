"""`torchrun … step1x train`: several processes are one run, whatever happens to one of them."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from step1x_edit.editor import Editor
from step1x_edit.request import EditRequest, RuntimeConfig
from step1x_edit.training.config import load
from step1x_edit.training.tuning import train

from ..tuning_runs import CAPTION, settings, write_config
from .command import STEP1X
from .test_train import STARTS_WITHIN_S, newest, wait_for_step

TORCHRUN = Path(sys.executable).parent / "torchrun"


def start(config, count, **options):
    command = [TORCHRUN, "--standalone", "--nproc-per-node", count, STEP1X, "train", config.name]
    return subprocess.Popen(
        [str(word) for word in command], cwd=config.parent, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        **options,
    )  # fmt: skip


def ranks_of(process):
    """Process ids by rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    environments = {
        int(pid): dict(
            pair.split("=", 1)
            for pair in Path(f"/proc/{pid}/environ").read_text().split("\0")
            if "=" in pair
        )
        for pid in children
    }
    found = {int(e["RANK"]): pid for pid, e in environments.items() if "RANK" in e}
    assert found, "torchrun has started nothing"
    return found


def write_run(folder, model, **changes):
    """A run of 8 steps, over batches of four and of one: of a batch of one some have no row."""
    changes = {"num_steps": 8, "lr": 1e-3, "report_every": 1, "save_every": 1} | changes
    values = settings(folder, model, instruction_dropout=0.3, ema_decay=0.9, **changes)
    values["data"]["batch_size"] = 4
    return write_config(folder.with_suffix(".yaml"), values)


def losses(folder):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines)}


def assert_same_curve(folder, other):
    assert losses(folder).keys() == losses(other).keys() == set(range(1, 9))
    for step, loss in losses(other).items():
        assert losses(folder)[step] == pytest.approx(loss, abs=1e-4), step
    one, two = newest(folder), newest(other)
    assert one["samples_seen"] == two["samples_seen"]
    for part in ("trained", "ema"):
        assert one[part].keys() == two[part].keys()
        for name, tensor in two[part].items():
            torch.testing.assert_close(one[part][name], tensor, rtol=1e-3, atol=1e-4)


def one_clear_line(process):
    """That of the step1x that says something, between torchrun's own."""
    _, err = process.communicate(timeout=STARTS_WITHIN_S)
    assert process.returncode != 0
    said = [line for line in err.splitlines() if line.startswith("step1x: ")]
    assert len(said) == 1, err
    return said[0]


@pytest.fixture
def whole(tiny_model, tmp_path):
    """Makes the same run in one process, and gives its folder."""

    def make(**changes):
        train(load(write_run(tmp_path / "whole", tiny_model, **changes)))
        return tmp_path / "whole"

    return make


def test_a_killed_process_ends_the_run_in_one_line_and_one_process_goes_on(
    tiny_model, tmp_path, whole
):
    folder, config = tmp_path / "run", write_run(tmp_path / "run", tiny_model)
    process = start(config, 2)
    wait_for_step(folder, process, 3)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    assert "another process of this run has ended: the same command goes on" in one_clear_line(
        process
    )
    assert 2 <= newest(folder)["step"] < 8
    assert train(load(config)) is None
    assert_same_curve(folder, whole())


def test_two_processes_go_on_with_the_run_of_one_and_write_the_whole_model(
    tiny_model, tmp_path, whole
):
    picture = str(tmp_path / "pairs" / "0.source.png")
    changes = {"kind": "full", "rank": None, "alpha": None, "schedule": "cosine",
               "samples": [{"prompt": CAPTION, "image": picture}]}  # fmt: skip
    alone = whole(**changes)
    folder, config = tmp_path / "run", write_run(tmp_path / "run", tiny_model, **changes)

    def stop(report):
        if report.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    assert train(load(config), watch=stop) is signal.SIGTERM
    process = start(config, 2)
    out, err = process.communicate(timeout=STARTS_WITHIN_S)
    assert process.returncode == 0, err
    assert out.splitlines()[-1] == str(folder)
    assert_same_curve(folder, alone)
    ours, theirs = (
        Editor.load(str(place / "model"), RuntimeConfig()).pipeline.transformer.state_dict()
        for place in (folder, alone)
    )
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-2, atol=1e-3)
    assert (folder / "step1x-edit-v1.1.safetensors").exists()
    assert (folder / "samples" / "00_step_00000008.png").exists()
    assert "loss.svg" in (folder / "card.md").read_text()


@pytest.mark.slow
def test_four_processes_stop_when_asked_and_two_go_on(tiny_model, tmp_path, whole):
    changes = {"num_steps": 8, "weights": "fp8", "layouts": ["kohya", "comfyui"]}
    folder, config = tmp_path / "run", write_run(tmp_path / "run", tiny_model, **changes)
    process = start(config, 4)
    wait_for_step(folder, process, 3)
    process.terminate()  # torchrun hands it on
    out, _ = process.communicate(timeout=STARTS_WITHIN_S)
    assert out.count("stopped and saved; the same command goes on") == 1
    assert 3 <= newest(folder)["step"] < 8
    process = start(config, 2)
    _, err = process.communicate(timeout=STARTS_WITHIN_S)
    assert process.returncode == 0, err
    assert_same_curve(folder, whole(**changes))
    chosen = RuntimeConfig.checked(lora=[str(folder / "lora_comfyui.safetensors")])
    request = EditRequest(image=tmp_path / "pairs" / "0.source.png", prompt=CAPTION, seed=0)
    assert Editor.load(str(tiny_model), chosen).edit(request).provenance.lora


@pytest.mark.slow
def test_a_process_that_is_killed_before_the_first_step_ends_the_run_in_one_line(
    tiny_model, tmp_path
):
    process = start(write_run(tmp_path / "run", tiny_model), 2)
    until = time.monotonic() + STARTS_WITHIN_S
    while not (tmp_path / "run" / ".lock").exists() and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    assert re.search("another process.* end.*: the same command goes on", one_clear_line(process))


@pytest.mark.slow
def test_what_is_wrong_is_said_once(tiny_model, tmp_path):
    config = write_run(tmp_path / "run", tiny_model, layers="no_such_layer")
    assert "fits no layer" in one_clear_line(start(config, 2))
    config.write_text(config.read_text() + "rnak: 4\n")
    assert "'rnak' is unknown" in one_clear_line(start(config, 2))


@pytest.mark.slow
def test_a_full_disk_is_said_by_the_first_alone(tiny_model, tmp_path):
    config = write_run(tmp_path / "run", tiny_model, num_steps=2)

    def little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    process = start(config, 2, preexec_fn=little_room)
    _, err = process.communicate(timeout=STARTS_WITHIN_S)
    said = [line for line in err.splitlines() if line.startswith("step1x: ")]
    assert len(said) == 3, err
    assert "no checkpoint of step 1 could be written (File too large)" in said[0]
    assert "no checkpoint of step 2 could be written (File too large)" in said[1]
    assert "free some room and give the same command again" in said[2]
    assert process.returncode == 1
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
