"""Weights that wait elsewhere, on the tiny folder; every combination is in `test_combinations`."""

from __future__ import annotations

import logging
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from step1x_edit import Editor, EditRequest, RuntimeConfig
from step1x_edit.errors import CheckpointError
from step1x_edit.runtime.disk import RowsOnDisk
from step1x_edit.runtime.offload import offload_to_memory
from step1x_edit.runtime.precision import StoredLinear, blocks

from .loading import load, picture_of

PRECISIONS = ("auto", "fp8", "int8", "int4")


@pytest.fixture(scope="module")
def undisturbed(tiny_model):
    """The picture of each precision without offload."""
    return {weights: picture_of(load(tiny_model, weights=weights)[0]) for weights in PRECISIONS}


def test_precisions_differ_a_little(undisturbed):
    exact = undisturbed["auto"]
    errors = {weights: float(np.abs(undisturbed[weights] - exact).mean()) for weights in PRECISIONS}
    assert errors["auto"] == 0 < errors["int8"] < errors["fp8"] < errors["int4"] < 0.05, errors


@pytest.mark.parametrize("weights", ["auto", "int4"])
def test_what_a_gpu_would_be_fed_by_changes_no_bit(tiny_model, undisturbed, weights):
    """The hooks of `block` for a GPU, here from main memory to main memory."""
    pipeline, _ = load(tiny_model, weights=weights)
    offload_to_memory(pipeline, "block", torch.device("cpu"))
    for _ in range(2):
        assert np.array_equal(picture_of(pipeline), undisturbed[weights])


def test_block_on_a_cpu_leaves_the_language_model_in_its_files(tiny_model, undisturbed):
    pipeline, streams = load(tiny_model, weights="fp8", offload="block")
    assert list(streams.files) == ["text_encoder"]
    encoder, transformer = (
        [p for _, block in blocks(network) for p in block.parameters()]
        for network in (pipeline.text_encoder, pipeline.transformer)
    )
    assert all(p.untyped_storage().nbytes() < 16 for p in encoder)
    assert all(p.untyped_storage().nbytes() == p.numel() * p.itemsize for p in transformer)
    assert np.array_equal(picture_of(pipeline), undisturbed["fp8"])


def test_blocks_on_disk_take_no_memory_and_come_back(tiny_model, undisturbed):
    pipeline, streams = load(tiny_model, offload="disk", weights="fp8")
    networks = (pipeline.transformer, pipeline.text_encoder)
    streamed = [block for network in networks for _, block in blocks(network)]
    assert len(streamed) == 4 + 4

    def held():
        return sum(
            parameter.untyped_storage().nbytes()
            for block in streamed
            for parameter in block.parameters()
        )

    empty = held()
    assert empty < 4 * sum(1 for block in streamed for _ in block.parameters()) + 1
    most = []
    hooks = [block.register_forward_pre_hook(lambda *_: most.append(held())) for block in streamed]
    picture_of(pipeline)
    assert held() == empty
    largest = max(sum(p.numel() * p.itemsize for p in block.parameters()) for block in streamed)
    assert empty < max(most) <= largest + empty, "more than one block at a time"
    assert isinstance(pipeline.text_encoder.get_input_embeddings(), RowsOnDisk)
    assert streams.times.reading > 0
    streams.remove()
    assert held() > largest
    read = sum(files.bytes_read for files in streams.files.values())
    assert np.array_equal(picture_of(pipeline), undisturbed["fp8"])
    for hook in hooks:
        hook.remove()
    assert sum(f.bytes_read for f in streams.files.values()) - read < 100_000  # embedding rows


def test_an_error_within_a_block_does_no_harm(tiny_model, undisturbed):
    pipeline, _ = load(tiny_model, offload="disk")
    block = pipeline.transformer.single_transformer_blocks[0]

    def fail(*_):
        raise RuntimeError("boom")

    hook = block.attn.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="boom"):
        picture_of(pipeline)
    hook.remove()
    assert np.array_equal(picture_of(pipeline), undisturbed["auto"])


def test_skipped_blocks_are_no_trouble(tiny_model):
    pipeline, _ = load(tiny_model, offload="disk")
    plain, _ = load(tiny_model)
    for each in (pipeline, plain):
        del each.transformer.single_transformer_blocks[0]
    assert np.array_equal(picture_of(pipeline), picture_of(plain))


def test_main_memory_saves_nothing_on_a_cpu_and_says_so(tiny_model, caplog):
    with caplog.at_level(logging.WARNING, "step1x_edit"):
        load(tiny_model, offload="model", device="cpu")
    assert "disk" in caplog.text


def test_half_the_weights_are_half_the_memory(tiny_model):
    pipeline, _ = load(tiny_model, weights="fp8")
    stored = [m for m in pipeline.transformer.modules() if isinstance(m, StoredLinear)]
    assert stored
    assert all(layer.weight.itemsize == 1 for layer in stored)
    assert pipeline.transformer.dtype == torch.float32


@pytest.mark.parametrize("kind", ["missing", "unexpected", "mismatched"])
@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
def test_files_that_do_not_fit_are_refused(tiny_model, tmp_path, kind, component):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (file,) = (folder / component).glob("*.safetensors")
    tensors = load_file(file)
    name = next(iter(tensors))
    if kind == "missing":
        del tensors[name]
    elif kind == "unexpected":
        tensors["stranger"] = torch.zeros(1)
    else:
        tensors[name] = torch.zeros(3)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{component}: tensors 1 {kind} \("):
        load(folder, offload="disk")


def test_a_file_cut_short_is_refused(tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (file,) = (folder / "transformer").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="get it again"):
        load(folder, offload="disk")


def test_the_editor_takes_the_settings(tiny_model):
    editor = Editor.load(str(tiny_model), RuntimeConfig(weights="fp8", offload="disk"))
    request = EditRequest(prompt="a red car", width=32, height=32, seed=1)
    assert editor.edit(request).images[0].size == (32, 32)
