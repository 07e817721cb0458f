"""`step1x train` through its door: what it refuses, and that no kill loses a run."""

import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

from step1x_edit.apps import cli
from step1x_edit.apps.console import working
from step1x_edit.apps.train import _followed
from step1x_edit.editor import Editor
from step1x_edit.request import EditRequest, RuntimeConfig
from step1x_edit.training.log import StepReport

from ..pair_sets import write_official
from ..tiny_model import write_tiny_official
from ..tuning_runs import settings, write_config
from .command import STEP1X, refused, run

STARTS_WITHIN_S = 600


def start(config, **options):
    return subprocess.Popen(
        [str(STEP1X), "train", config.name], cwd=config.parent, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def wait_for_step(folder, process, step):
    """Wait until the log has so many steps."""
    log = folder / "log.jsonl"
    until = time.monotonic() + STARTS_WITHIN_S
    while process.poll() is None and time.monotonic() < until:
        lines = log.read_text().splitlines() if log.exists() else []
        if any(line.endswith("}") and json.loads(line)["step"] >= step for line in lines):
            return
        time.sleep(0.02)
    assert process.returncode is None, process.communicate()
    process.kill()
    raise AssertionError(f"no step {step} within {STARTS_WITHIN_S} s")


def newest(folder):
    return torch.load(max((folder / "checkpoints").glob("*.pt")))


def assert_same_run(one, other):
    one, other = newest(one), newest(other)
    assert one["step"] == other["step"]
    for name, tensor in one["trained"].items():
        assert torch.equal(tensor, other["trained"][name]), name
    states = zip(one["optimizers"][0]["state"].values(), other["optimizers"][0]["state"].values(),
                 strict=True)  # fmt: skip
    assert all(torch.equal(a["exp_avg_sq"], b["exp_avg_sq"]) for a, b in states)


@pytest.fixture
def config(tiny_model, tmp_path):
    """A run of 60 steps, which would save at its end alone."""
    values = settings(tmp_path / "run", tiny_model, num_steps=60, report_every=1)
    return write_config(tmp_path / "run.yaml", values)


@pytest.fixture
def whole(tiny_model, tmp_path):
    """The same run, never stopped, and its folder."""
    values = settings(tmp_path / "whole", tiny_model, num_steps=60, report_every=1)
    assert cli.run(["train", str(write_config(tmp_path / "whole.yaml", values)), "-q"]) == 0
    return tmp_path / "whole"


def test_help_answers_without_torch():
    program = (
        "import sys; from step1x_edit.apps.cli import run; code = run(['train', '--help']); "
        "heavy = {'torch', 'diffusers', 'transformers', 'scipy'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rnak": 4}, ["'rnak' is unknown: did you mean 'rank'"]),
        ({"rank": 0}, ["rank", "greater than 0"]),
        ({"model": "no/such/place"}, ["no/such/place"]),
        ({"kind": "laura"}, ["laura"]),
    ],
)
def test_wrong_settings_are_refused_in_one_line(tmp_path, tiny_model, change, says):
    values = settings(tmp_path / "run", tiny_model) | change
    write_config(tmp_path / "run.yaml", values)
    refused(tmp_path, ["train", "run.yaml"], *says)


def test_wrong_data_and_samples_are_refused_before_the_model_is_loaded(tmp_path, tiny_model):
    values = settings(tmp_path / "run", tiny_model, samples=[{"prompt": "x", "image": "no.png"}])
    write_config(tmp_path / "run.yaml", values)
    refused(tmp_path, ["train", "run.yaml"], r"no\.png")
    (tmp_path / "pairs" / "0.txt").unlink()
    values.pop("samples")
    write_config(tmp_path / "run.yaml", values)
    refused(tmp_path, ["train", "run.yaml"], "pairs")


def test_a_terminal_shows_loss_speed_and_the_time_left(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "140")
    with _followed(quiet=False) as watch:
        with working("loading", steps=True) as advance:  # another bar, before the first step
            advance(1, 2)
        watch(StepReport(3, 60, 6, 0.5, 1.0, 1e-4, 7.25, 90.0, True))
        watch(StepReport(4, 60, 8, 0.25, 1.0, 1e-4, 7.25, 90.0, True))
    shown = sys.stderr.getvalue()
    assert all(words in shown for words in ("training", "4/60", "loss 0.2500  7.25 samples/s"))


def test_an_official_toml_needs_a_place_for_its_result(tmp_path):
    refused(tmp_path, ["train", "data.toml"], r"data\.toml.*--output")


@pytest.mark.parametrize("model", ["v1.0", "v1.1", "mini"])
def test_the_official_toml_trains_every_model(tmp_path, model, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    toml, out = write_official(tmp_path / "set", [(96, 64)] * 3), tmp_path / "out"
    if model != "mini":
        model = str(write_tiny_official(tmp_path / "model", version=model))
    command = ["train", str(toml), "--model", model, "-o", str(out), "--steps", "2", "-q"]
    assert cli.run(command) == 0
    chosen = RuntimeConfig.checked(lora=[str(out / "lora_kohya.safetensors")])
    request = EditRequest(
        image=tmp_path / "set" / "source" / "0.png", prompt="make it darker", seed=0
    )
    assert Editor.load(model, chosen).edit(request).provenance.lora
    card = (out / "card.md").read_text()
    assert all(line in card for line in ("rank: 64", "alpha: 32", "lr: 0.0001", "weights: fp8"))


def test_signals_save_and_stop_and_the_same_command_goes_on(config, whole, tmp_path):
    folder = tmp_path / "run"
    for number, code, step in ((signal.SIGTERM, 143, 5), (signal.SIGINT, 130, 20)):
        process = start(config)
        wait_for_step(folder, process, step)
        process.send_signal(number)
        out, err = process.communicate(timeout=STARTS_WITHIN_S)
        assert process.returncode == code, err
        assert "the same command goes on" in out
        assert newest(folder)["step"] >= step
    done = run(tmp_path, ["train", "run.yaml"])
    assert done.returncode == 0, done.stderr
    assert_same_run(folder, whole)
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 61))


def stop_often(config, whole, tmp_path, numbers, seed):
    """Stop a run again and again, at random moments, and compare its end with that of `whole`."""
    folder, draw = tmp_path / "run", random.Random(seed)
    config.write_text(config.read_text() + "save_every: 1\n")
    for number in numbers:
        done = newest(folder)["step"] if list(folder.glob("checkpoints/*.pt")) else 0
        process = start(config)
        if draw.random() < 0.7 and done < 58:
            # Anywhere within a step or its saving; the others while the run begins.
            wait_for_step(folder, process, done + draw.randint(1, 2))
            time.sleep(draw.uniform(0, 0.1))
        else:
            time.sleep(draw.uniform(0, 12))
        process.send_signal(number)
        _, err = process.communicate(timeout=STARTS_WITHIN_S)
        assert "Traceback" not in err
        assert not list(folder.glob("checkpoints/*.pt")) or newest(folder)["step"] >= done
    done = run(tmp_path, ["train", "run.yaml"])
    assert done.returncode == 0, done.stderr
    assert_same_run(folder, whole)
    assert not list(folder.rglob("*.new"))


def test_stops_at_random_moments_lose_nothing(config, whole, tmp_path):
    """``STEP1X_STOPS=20`` stops it twenty times, which takes minutes."""
    signals = [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT]
    count = int(os.environ.get("STEP1X_STOPS", "3"))
    stop_often(config, whole, tmp_path, (signals * count)[:count], seed=0)


def test_a_full_disk_is_one_clear_line_and_the_run_can_go_on(config, whole, tmp_path):
    folder = tmp_path / "run"
    process = start(config)
    wait_for_step(folder, process, 3)
    process.terminate()
    process.communicate()
    stood = {path.name: path.read_bytes() for path in (folder / "checkpoints").iterdir()}
    size = len(next(iter(stood.values())))

    def little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, resource.RLIM_INFINITY))

    process = start(config, preexec_fn=little_room)
    _, err = process.communicate(timeout=STARTS_WITHIN_S)
    assert process.returncode == 1
    assert "Traceback" not in err
    assert "free some room and give the same command again" in err.splitlines()[-1]
    assert {p.name: p.read_bytes() for p in (folder / "checkpoints").iterdir()} == stood
    assert run(tmp_path, ["train", "run.yaml"]).returncode == 0
    assert_same_run(folder, whole)
