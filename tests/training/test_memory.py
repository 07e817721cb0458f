"""Memory of training foretold: against real tensors, real processes, and what the command says."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from step1x_edit.apps import cli
from step1x_edit.apps.training_fit import choose, read_run
from step1x_edit.checkpoints.resolve import look
from step1x_edit.editor import Editor
from step1x_edit.model.config import tiny_transformer
from step1x_edit.model.transformer import Step1XEditTransformer2DModel
from step1x_edit.runtime.blueprint import blueprint
from step1x_edit.runtime.memory import AtOnce, Estimate
from step1x_edit.runtime.offload import stream_from_memory
from step1x_edit.runtime.peak import PeakTracker
from step1x_edit.training import lora
from step1x_edit.training.config import load
from step1x_edit.training.memory import estimate, random_batch
from step1x_edit.training.tuning import Tuning

from ..apps.command import refused
from ..pair_sets import write_official
from ..tuning_runs import settings, write_config

PERF = Path(__file__).parents[2] / "perf"


@pytest.fixture(scope="module")
def deep_model(tiny_model, tmp_path_factory):
    """The tiny model with rows of blocks that are longer than what is simulated."""
    folder = tmp_path_factory.mktemp("deep") / "model"
    shutil.copytree(tiny_model, folder)
    plain = Step1XEditTransformer2DModel.load_config(folder / "transformer")
    sizes = tiny_transformer(
        connector_in_channels=plain["connector_in_channels"], num_layers=5, num_single_layers=7
    )
    Step1XEditTransformer2DModel(**sizes).save_pretrained(folder / "transformer")
    return folder


def run_of(folder, model, **changes):
    folder.mkdir(exist_ok=True, parents=True)
    return load(write_config(folder / "run.yaml", settings(folder / "run", model, **changes)))


def foretell(model, config, **wanted):
    """(weights, offload) → estimate with AdamW."""
    given = {"dtype": torch.float32, "kind": "cpu"} | wanted
    found = estimate(blueprint(str(model), look(model)), config, **given)
    return {(each.weights, each.offload): each for each in found["adamw"]}


def peak_of_a_real_step(tuning):
    """Beside weights and matrices."""
    tracker = PeakTracker()
    for tensor in (*tuning.transformer.parameters(), *tuning.transformer.buffers()):
        tracker.know(tensor)
    batch = random_batch(tuning)
    with tracker:
        tuning.loss_of(batch, 0).backward()
    return tracker.peak


def trained_bytes(tuning):
    return sum(p.nbytes for p in tuning.transformer.parameters() if p.requires_grad)


def frozen_bytes(tuning):
    """Of what takes its own memory."""
    frozen = (p for p in tuning.transformer.parameters() if not p.requires_grad)
    return sum(p.nbytes for p in frozen if p.untyped_storage().nbytes() > 4)


@pytest.mark.parametrize("weights", ["auto", "fp8"])
def test_a_step_is_that_of_a_real_one(deep_model, tmp_path, weights):
    config = run_of(tmp_path, deep_model, weights=weights, rank=4)
    real = Tuning(config)
    # Two moments and the matrices themselves.
    beside = frozen_bytes(real) + 3 * trained_bytes(real)
    foretold = foretell(deep_model, config, weights=[weights])
    peak = peak_of_a_real_step(real)
    assert foretold[weights, "none"].stages["steps"] - beside == pytest.approx(peak, rel=0.03)
    if weights == "fp8":
        return
    # Blocks that wait, read where the tracker sees it.
    editor = Editor.load(str(deep_model), config.runtime())
    stream = stream_from_memory(editor.pipeline.transformer, torch.device("cpu"))
    stream._reader = AtOnce()
    read = stream._read
    stream._read = lambda block: {p: weight.clone() for p, weight in read(block).items()}
    waiting = Tuning(config, (editor, lambda: None))
    beside = frozen_bytes(waiting) + 3 * trained_bytes(waiting)
    peak = peak_of_a_real_step(waiting)
    assert foretold[weights, "disk"].stages["steps"] - beside == pytest.approx(peak, rel=0.03)


def test_what_costs_and_what_saves(deep_model, tmp_path):
    config = run_of(tmp_path, deep_model)
    plain = foretell(deep_model, config, kind="cuda", weights=["auto"])
    steps = {offload: each.stages["steps"] for (_, offload), each in plain.items()}
    assert steps["block"] == steps["disk"] < steps["none"]
    # Blocks are read from files into main memory first, on a GPU without a stop there.
    assert plain["auto", "disk"].main_memory == 0 < plain["auto", "block"].main_memory
    kept = foretell(
        deep_model, run_of(tmp_path / "kept", deep_model, gradient_checkpointing=False),
        weights=["auto"],
    )  # fmt: skip
    assert set(kept) == {("auto", "none")}
    assert kept["auto", "none"].stages["steps"] > steps["none"]
    averaged = run_of(tmp_path / "averaged", deep_model, ema_decay=0.9)
    more = foretell(deep_model, averaged, kind="cuda", weights=["auto"])["auto", "none"]
    sizes = lora.matrix_sizes(Tuning(config).transformer, config)
    assert more.stages["steps"] - steps["none"] == 4 * sum(sizes)


@pytest.mark.parametrize(
    ("free", "main", "setting"),
    [
        (40e9, 64e9, ("auto", "none", "adamw")),
        (25e9, 64e9, ("int8", "none", "adamw8bit")),
        (8e9, 64e9, ("auto", "block", "adamw8bit")),
        (8e9, 16e9, ("auto", "disk", "adamw8bit")),
        (4e9, 64e9, None),
    ],
)
def test_the_first_setting_that_fits_is_recommended(free, main, setting):
    sizes = {
        ("auto", "none"): (30, 41), ("int8", "none"): (25, 25), ("auto", "block"): (8, 41),
        ("auto", "disk"): (8, 0),
    }  # fmt: skip
    found = {
        optimizer: [
            Estimate(*key, False, {"steps": int((peak - less) * 1e9)}, int(waits * 1e9))
            for key, (peak, waits) in sizes.items()
        ]
        for optimizer, less in (("adamw", 0), ("adamw8bit", 1.5))
    }
    chosen = choose(found, free, main)
    found_setting = chosen and (chosen[0].weights, chosen[0].offload, chosen[1])
    assert found_setting == setting


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_samples_count_with_all_networks_where_they_run(tiny_model, tmp_path, kind):
    plain = foretell(tiny_model, run_of(tmp_path, tiny_model), kind=kind)
    sample = {"prompt": "make it darker", "size_level_px": 256}
    config = run_of(tmp_path, tiny_model, samples=[sample])
    sampled = foretell(tiny_model, config, kind=kind)
    assert sampled["auto", "none"].stage == "samples"
    for setting, each in plain.items():
        assert "samples" not in each.stages
        assert sampled[setting].stages["samples"] > each.stages["picture"]
    larger = run_of(tmp_path, tiny_model, samples=[{**sample, "size_level_px": 512}])
    again = foretell(tiny_model, larger, kind=kind)
    assert again["auto", "none"].peak > sampled["auto", "none"].peak


def test_doctor_reads_the_sizes_of_an_official_toml(tmp_path):
    toml = write_official(tmp_path, [(64, 64)], side=768)
    toml.write_text(toml.read_text().replace("batch_size = 1", "batch_size = 3"))
    assert read_run(toml, None, None).data.heaviest == (768, 3)
    assert read_run(toml, None, 256).data.heaviest == (256, 3)


def test_doctor_tells_of_training(tiny_model, tmp_path, capsys):
    values = settings(tmp_path / "run", tiny_model, rank=8)
    config = write_config(tmp_path / "run.yaml", values)
    assert cli.run(["doctor", "--train", str(config), "--device", "cpu"]) == 0
    head, columns, *rows, _, _, advice = capsys.readouterr().out.splitlines()
    assert "a LoRA of rank 8, batches of 2 at size level 64, float32" in head
    assert columns.split()[:4] == ["weights", "offload", "peak", "while"]
    assert len(rows) == 4 * 3
    says = r"Write weights: auto, offload: none, optimizer: adamw in the run of .*"
    assert re.match(says, advice)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["doctor", "run.yaml"], "doctor --train run.yaml"),
        (["doctor", "--train", "--guidance", "3"], "--guidance is of editing"),
        (["doctor", "--train", "full.yaml"], "kind full"),
        (["doctor", "--train", "--model", "no/such"], "no/such"),
    ],
)
def test_wrong_questions_are_refused_in_one_line(tiny_model, tmp_path, words, says):
    values = settings(tmp_path / "run", tiny_model)
    write_config(tmp_path / "run.yaml", values)
    write_config(
        tmp_path / "full.yaml", settings(tmp_path / "run", tiny_model, kind="full", rank=None,
                                         alpha=None),
    )  # fmt: skip
    refused(tmp_path, words, says)


@pytest.mark.slow
def test_foretold_and_measured_are_close():
    command = [sys.executable, str(PERF / "train_memory.py"), "--only", "check"]
    done = subprocess.run(
        [*command, "--size-level", "64", "--ways", "fp8:none", "auto:disk"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    ratios = {(row[1].strip(), row[2].strip()): float(row[5]) for row in rows}
    assert set(ratios) == {("fp8", "none"), ("auto", "disk")}, done.stderr
    assert all(0.9 <= ratio <= 1.1 for ratio in ratios.values()), ratios


@pytest.mark.slow
def test_one_step_of_any_size_is_made_and_cleaned_up_after(tmp_path):
    command = [sys.executable, str(PERF / "full_size_training.py"), "--scale", "tiny"]
    (tmp_path / "models").mkdir()
    done = subprocess.run(
        [*command, "--size-level", "64", "--folder", "models", "--out", "result.json"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    step = json.loads((tmp_path / "result.json").read_text())["step"]
    assert 0.1 < step["peak_resident_gib"] < 2
    assert 0 < step["matrices_with_gradient"] <= step["matrices_changed"] <= step["matrices"]
    assert list((tmp_path / "models").iterdir()) == []
