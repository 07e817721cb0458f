"""Models by path alone, in each layout of the release: loaded, and computing the reference."""

from __future__ import annotations

import hashlib
import shutil
import socket

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from step1x_edit import Editor, EditRequest, RuntimeConfig
from step1x_edit.checkpoints.contents import fingerprint
from step1x_edit.checkpoints.official import load_transformer
from step1x_edit.errors import CheckpointError
from step1x_edit.model.guidance import prepare_ids
from step1x_edit.model.instruction_config import RELEASE_V1
from step1x_edit.model.release_text import RELEASE_TEXTS, ReleaseText, keep_text
from step1x_edit.runtime.precision import StoredLinear

from ..tiny_model import OFFICIAL_NAMES, REFERENCE, write_tiny_model, write_tiny_official

PREFIX = "Look at the picture and follow the instruction. " * 7

# The call that the published folder is documented with.
PUBLISHED_CALL = """
import torch
from diffusers import Step1XEditPipeline
from diffusers.utils import load_image

pipe = Step1XEditPipeline.from_pretrained("stepfun-ai/Step1X-Edit-v1p1-diffusers", torch_dtype=torch.bfloat16)
pipe.to("cuda")
image = load_image("examples/0000.jpg").convert("RGB")
prompt = "add a red car"
image = pipe(
    image=image,
    prompt=prompt,
    num_inference_steps=28,
    size_level=1024,
    guidance_scale=6.0,
    generator=torch.Generator().manual_seed(1234),
).images[0]
image.save("output.png")
"""  # noqa: E501


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No network, and a cache of its own."""

    def refuse(self, address):
        raise AssertionError(f"connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 72, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    return tmp_path / "in.png"


def relative_error(got, wanted):
    return ((got - wanted).norm() / wanted.norm()).item()


@torch.no_grad()
def reference_error(editor, version):
    """Of the loaded transformer's velocities, and of the text-to-image ones."""
    io = load_file(REFERENCE / f"transformer_{version.replace('.', 'p')}_io.safetensors")
    model = editor.pipeline.transformer
    text = (io["encoder_hidden_states"], io["mask"], io["timestep"])
    output = model(io["hidden_states"], *text, io["img_ids"], io["txt_ids"]).sample
    drawn = model(io["hidden_states"][:, :24], *text, *prepare_ids(12, (6, 4))).sample
    return max(relative_error(output, io["output"]), relative_error(drawn, io["t2i_output"]))


@pytest.mark.parametrize("version", ["v1.0", "v1.1"])
def test_official_files(version, tmp_path, picture):
    transformer = write_tiny_official(tmp_path / "release", version=version)
    editor = Editor.load(str(transformer), RuntimeConfig(offline=True))
    assert editor.pipeline.transformer.version == version
    assert reference_error(editor, version) <= 1e-5
    io = load_file(REFERENCE / "vae_io.safetensors")
    vae = editor.pipeline.vae
    with torch.no_grad():
        mean = vae.encode(io["image"]).latent_dist.mean
    assert relative_error(0.3611 * (mean - 0.1159), io["latent_mean"]) <= 1e-5

    by_folder = Editor.load(str(transformer.parent))
    assert by_folder.model_hash == editor.model_hash
    request = EditRequest(image=picture, prompt="a", seed=1, num_steps=2, size_level_px=64)
    one, other = (loaded.edit(request) for loaded in (editor, by_folder))
    assert one.images[0].size == (72, 50)
    assert np.array_equal(np.asarray(one.images[0]), np.asarray(other.images[0]))
    assert one.provenance.guidance == 6


def test_diffusers_folder(tmp_path):
    folder = write_tiny_model(tmp_path / "model")
    shutil.rmtree(folder / "transformer")
    shutil.copytree(REFERENCE / "diffusers_v1p1" / "transformer", folder / "transformer")
    editor = Editor.load(str(folder), RuntimeConfig(offline=True))
    assert reference_error(editor, "v1.1") <= 1e-5
    assert editor.model_hash == fingerprint(folder)


def change(file, function):
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file({k: function(k, v) for k, v in load_file(file).items()}, file, metadata)


def test_fp8_file(tmp_path):
    """Stored in fp8, computed in float32: every weight is the stored one."""
    transformer = write_tiny_official(tmp_path / "release", version="v1.0")
    exact = load_transformer(transformer, torch_dtype=torch.float32).state_dict()
    change(transformer, lambda _, tensor: tensor.to(torch.float8_e4m3fn))
    editor = Editor.load(str(transformer))
    model = editor.pipeline.transformer
    loaded = dict(model.named_parameters())
    for name, tensor in exact.items():
        layer, _, key = name.rpartition(".")
        owner = model.get_submodule(layer)
        stored = key == "weight" and isinstance(owner, StoredLinear)
        value = owner.widened(torch.float32) if stored else loaded[name]
        assert torch.equal(value, tensor.to(torch.float8_e4m3fn).float()), name
    assert any(isinstance(module, StoredLinear) for module in model.modules())
    assert 1e-4 < reference_error(editor, "v1.0") < 0.2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(tmp_path, value):
    def spoil(name, tensor):
        if name in ("img_in.weight", "decoder.conv_in.bias", "visual.merger.ln_q.weight"):
            tensor.view(-1)[3] = value
        return tensor

    spoilt = {
        OFFICIAL_NAMES["v1.1"]: "x_embedder.weight",
        "vae.safetensors": r"decoder\.conv_in\.bias",
        "Qwen2.5-VL-7B-Instruct/model.safetensors": r"visual\.merger\.ln_q\.weight",
    }
    for name, tensor in spoilt.items():
        transformer = write_tiny_official(tmp_path / name.partition(".")[0])
        change(transformer.parent / name, spoil)
        with pytest.raises(CheckpointError, match=f"{tensor} holds NaN or infinite") as error:
            Editor.load(str(transformer))
        assert "\n" not in str(error.value)


@pytest.fixture
def release(monkeypatch):
    """A text in the place of the release's."""
    text = ReleaseText("modules/conditioner.py", hashlib.sha256(PREFIX.encode()).hexdigest())
    monkeypatch.setitem(RELEASE_TEXTS, RELEASE_V1.prefix_constant, text)


def test_released_folder_needs_its_prefix(release, tmp_path, picture):
    transformer = write_tiny_official(tmp_path / "release", described=False)
    with pytest.raises(CheckpointError, match=r"Qwen25VL_7b_PREFIX.*models pull constants"):
        Editor.load(str(transformer), RuntimeConfig(offline=True))
    source = tmp_path / "checkout" / "modules" / "conditioner.py"
    source.parent.mkdir(parents=True)
    source.write_text(f"Qwen25VL_7b_PREFIX = {PREFIX!r}\n")
    runtime = RuntimeConfig(offline=True, official_source=tmp_path / "checkout")
    editor = Editor.load(str(transformer), runtime)
    assert editor.pipeline.instruction == RELEASE_V1.with_prefix(PREFIX)
    result = editor.edit(EditRequest(image=picture, prompt="a", num_steps=1, size_level_px=64))
    assert result.images[0].size == (72, 50)


def test_published_call_runs_when_our_import_is_pasted(release, tmp_path, picture, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_tiny_model(tmp_path / "published")
    (folder / "instruction.json").unlink()  # published folders have none
    call = PUBLISHED_CALL.replace("from diffusers import", "from step1x_edit import")
    for theirs, ours in (
        ("stepfun-ai/Step1X-Edit-v1p1-diffusers", str(folder)),
        ("cuda", "cpu"),
        ("examples/0000.jpg", "in.png"),
        ("=28", "=2"),
        ("=1024", "=64"),
    ):
        call = call.replace(theirs, ours)
    with pytest.raises(CheckpointError, match="models pull constants"):
        exec(call, {})
    keep_text("Qwen25VL_7b_PREFIX", PREFIX)
    exec(call, {})
    one = np.asarray(Image.open("output.png"))
    exec(call.replace("guidance_scale", "true_cfg_scale"), {})
    assert one.shape == (48, 64, 3)
    assert np.array_equal(one, np.asarray(Image.open("output.png")))
    exec(call.replace("guidance_scale=6.0", "true_cfg_scale=2.0"), {})
    assert not np.array_equal(one, np.asarray(Image.open("output.png")))


def test_names_that_are_not_here_are_refused_offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    for name in ("v1.0", "v1.1", "some/body"):
        with pytest.raises(CheckpointError, match=f"'{name}' is not here, and --offline.*pull"):
            Editor.load(name, RuntimeConfig(offline=True))
