"""LoRA runs whose blocks wait elsewhere: the same run to the bit, and what cannot be one."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from step1x_edit.errors import InvalidRequest
from step1x_edit.training import placing
from step1x_edit.training.config import load
from step1x_edit.training.tuning import Tuning, train

from ..apps.command import refused, run
from ..tiny_model import write_tiny_official
from ..tuning_runs import CAPTION, settings, write_config


def run_of(folder, model, **changes):
    folder.parent.mkdir(parents=True, exist_ok=True)
    return load(write_config(folder.with_suffix(".yaml"), settings(folder, model, **changes)))


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_run(one, other):
    """The same losses, the same LoRA in the files, to the bit."""
    assert losses(one) == losses(other)
    states = [torch.load(max((each / "checkpoints").iterdir()))["trained"] for each in (one, other)]
    assert states[0].keys() == states[1].keys()
    for key, tensor in states[0].items():
        assert torch.equal(tensor, states[1][key]), key
    assert any(tensor.any() for key, tensor in states[0].items() if "lora_B" in key)
    files = [load_file(each / "lora_kohya.safetensors") for each in (one, other)]
    assert all(torch.equal(tensor, files[1][key]) for key, tensor in files[0].items())


@pytest.mark.parametrize(
    "changes",
    [{}, {"weights": "fp8", "dtype": "bfloat16"}, {"weights": "int4", "optimizer": "adamw8bit"}],
)
def test_blocks_read_from_the_files_change_no_bit(tiny_model, tmp_path, changes):
    if "optimizer" in changes:
        pytest.importorskip("bitsandbytes")
    for offload in ("none", "disk"):
        config = run_of(
            tmp_path / offload, tiny_model, num_steps=4, report_every=1, offload=offload, **changes
        )
        assert train(config) is None
    assert_same_run(tmp_path / "none", tmp_path / "disk")


def test_so_does_an_official_file_by_the_command(tmp_path):
    model = write_tiny_official(tmp_path / "model", version="v1.0")
    pictures = []
    for offload in ("none", "disk"):
        values = settings(
            tmp_path / offload, model, num_steps=3, report_every=1, offload=offload,
            samples=[{"prompt": CAPTION, "image": str(tmp_path / "pairs" / "0.source.png"),
                      "num_steps": 2, "size_level_px": 64}],
            sample_every=3,
        )  # fmt: skip
        write_config(tmp_path / f"{offload}.yaml", values)
        done = run(tmp_path, ["train", f"{offload}.yaml", "-q"])
        assert done.returncode == 0, done.stderr
        assert_same_run(tmp_path / "none", tmp_path / offload)
        (path,) = (tmp_path / offload).glob("samples/*.png")
        pictures.append(np.asarray(Image.open(path)))
    assert np.array_equal(*pictures)


def test_a_stopped_run_goes_on(tiny_model, tmp_path):
    whole = run_of(tmp_path / "whole", tiny_model, num_steps=4, report_every=1, offload="disk")
    train(whole)
    values = {"num_steps": 4, "report_every": 1}
    train(run_of(tmp_path / "parts", tiny_model, **values | {"num_steps": 2}, offload="none"))
    train(run_of(tmp_path / "parts", tiny_model, **values, offload="disk"))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_memory_holds_two_blocks_in_both_directions(tiny_model, tmp_path):
    """Every block is read once forward and once backward, the next one before it is needed."""
    tuning = Tuning(run_of(tmp_path / "run", tiny_model, offload="disk"))
    streamed = [
        parameter
        for name, parameter in tuning.transformer.named_parameters()
        if "_blocks." in name and "lora" not in name
    ]
    assert streamed
    empty = [parameter for parameter in streamed if parameter.untyped_storage().nbytes() > 4]
    assert not empty
    seen = []
    blocks = [*tuning.transformer.transformer_blocks, *tuning.transformer.single_transformer_blocks]

    def held(block):
        def look(*_):
            full = [
                other
                for other in blocks
                if any(p.untyped_storage().nbytes() > 4 for p in other.parameters() if p.ndim > 1
                       and not p.requires_grad)
            ]  # fmt: skip
            seen.append((blocks.index(block), full == [block]))

        return look

    for block in blocks:
        block.register_forward_pre_hook(held(block))
    batch = batch_for(tuning)
    tuning.loss_of(batch, 0).backward()
    order = [*range(len(blocks))]
    assert seen == [(index, True) for index in [*order, *reversed(order)]]


def batch_for(tuning):
    from .test_tuning import batch_for

    return batch_for(tuning)


@pytest.mark.parametrize("offload", ["none", "block"])
def test_what_a_gpu_run_moves_comes_back(tiny_model, tmp_path, monkeypatch, offload):
    """On a CPU in the place of the GPU: main memory is both ends of the way."""
    plain = run_of(tmp_path / "plain", tiny_model, num_steps=3, report_every=1)
    train(plain)
    placed = []

    def open_model(config):
        editor, _ = original(config)
        bring = placing.place(editor.pipeline, offload, torch.device("cpu"))
        weight = editor.pipeline.transformer.single_transformer_blocks[0].proj_mlp.weight
        placed.append(weight.untyped_storage().nbytes())
        return editor, bring

    original = placing.open_model
    monkeypatch.setattr("step1x_edit.training.tuning.open_model", open_model)
    train(run_of(tmp_path / "placed", tiny_model, num_steps=3, report_every=1))
    assert placed == [4]  # one number stands for all
    assert_same_run(tmp_path / "plain", tmp_path / "placed")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kind": "full", "rank": None, "alpha": None}, "that are trained cannot wait elsewhere"),
        ({"gradient_checkpointing": False}, "leave gradient_checkpointing on"),
        ({"offload": "model"}, "offload"),
    ],
)
def test_what_cannot_be_offloaded_is_refused_in_one_line(tiny_model, tmp_path, changes, says):
    values = settings(tmp_path / "run", tiny_model, **{"offload": "disk", **changes})
    write_config(tmp_path / "run.yaml", values)
    refused(tmp_path, ["train", "run.yaml"], says)


def test_the_connector_is_not_run_again(tiny_model, tmp_path):
    config = run_of(tmp_path / "run", tiny_model, offload="disk", layers=r"connector\..*")
    with pytest.raises(InvalidRequest, match=r"connector\..*leave the connector out"):
        Tuning(config)
