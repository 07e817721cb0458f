"""Official single files: read strictly, computed with, written back."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from step1x_edit.checkpoints.official import load_transformer, load_vae, save_vae
from step1x_edit.errors import CheckpointError
from step1x_edit.model.config import tiny_transformer
from step1x_edit.model.official_layout import Row
from step1x_edit.model.transformer import Step1XEditTransformer2DModel

REFERENCE = Path(__file__).parents[1] / "reference"
TRANSFORMERS = [REFERENCE / f"transformer_{name}_official.safetensors" for name in ("v1p0", "v1p1")]
VAE = REFERENCE / "vae_official.safetensors"


def relative_error(got, wanted):
    return ((got - wanted).norm() / wanted.norm()).item()


def assert_same_tensors(one, other):
    one, other = load_file(one), load_file(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("path", TRANSFORMERS, ids=lambda path: path.stem)
def test_official_to_ours_to_official_is_identical(path, tmp_path):
    model = load_transformer(path)
    assert not any(parameter.is_meta for parameter in model.parameters())
    model.to_official(tmp_path / "again.safetensors")
    assert_same_tensors(path, tmp_path / "again.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_ours_to_official_to_ours_is_identical_in_every_dtype(dtype, tmp_path):
    model = Step1XEditTransformer2DModel(**tiny_transformer(connector_scale_factor=True)).to(dtype)
    model.to_official(tmp_path / "model.safetensors")
    again = Step1XEditTransformer2DModel.from_official(tmp_path / "model.safetensors")
    assert again.version == "v1.0"
    assert again.config.connector_heads_num == model.config.connector_heads_num
    assert tuple(again.config.axes_dims_rope) == model.config.axes_dims_rope
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name].float(), tensor.float()), name
        assert again.state_dict()[name].dtype == dtype


def test_reference_folder_and_official_file_hold_the_same_model():
    folder = Step1XEditTransformer2DModel.from_pretrained(
        REFERENCE / "diffusers_v1p1" / "transformer", torch_dtype=torch.float32
    )
    file = load_transformer(TRANSFORMERS[1], torch_dtype=torch.float32)
    for name, tensor in folder.state_dict().items():
        assert torch.equal(file.state_dict()[name], tensor), name


def without_metadata(tmp_path):
    path = tmp_path / "bare.safetensors"
    save_file(load_file(TRANSFORMERS[1]), path)
    return path


def test_sizes_that_the_file_does_not_tell_are_asked_for(tmp_path):
    path = without_metadata(tmp_path)
    with pytest.raises(CheckpointError, match="does not tell axes_dims_rope; give axes_dims_rope="):
        load_transformer(path)
    with pytest.raises(CheckpointError, match="give connector_heads_num="):
        load_transformer(path, axes_dims_rope=(8, 20, 20))
    model = load_transformer(path, axes_dims_rope=(8, 20, 20), connector_heads_num=4)
    assert (model.config.num_attention_heads, model.config.num_single_layers) == (2, 3)


@pytest.mark.parametrize("config", [{"num_layers": 3}, {"connector_depth": 3}])
def test_config_that_contradicts_the_file_is_refused(config):
    with pytest.raises(CheckpointError, match=r"missing: .*\.2\."):
        load_transformer(TRANSFORMERS[1], **config)


def test_config_that_cannot_be_is_refused_in_one_line():
    with pytest.raises(
        CheckpointError, match="add up to 40, not to attention_head_dim 48"
    ) as caught:
        load_transformer(TRANSFORMERS[1], axes_dims_rope=(8, 16, 16))
    assert "\n" not in str(caught.value)


def changed(tmp_path, change, source=TRANSFORMERS[1]):
    tensors = load_file(source)
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    change(tensors)
    save_file(tensors, tmp_path / "changed.safetensors", metadata)
    return tmp_path / "changed.safetensors"


def test_missing_unexpected_and_misshapen_tensors_are_listed(tmp_path):
    def change(tensors):
        del tensors["double_blocks.1.img_mlp.0.bias"]
        tensors["surplus.weight"] = torch.zeros(3)
        tensors["txt_in.bias"] = torch.zeros(7)

    with pytest.raises(CheckpointError) as caught:
        load_transformer(changed(tmp_path, change))
    message = str(caught.value)
    assert "1 missing: double_blocks.1.img_mlp.0.bias" in message
    assert "1 unexpected: surplus.weight" in message
    assert "1 of another shape: txt_in.bias [7] instead of [96]" in message
    assert "\n" not in message


def test_missing_tensor_that_tells_a_size_is_named(tmp_path):
    path = changed(tmp_path, lambda tensors: tensors.pop("img_in.weight"))
    with pytest.raises(CheckpointError, match=r"img_in\.weight is missing"):
        load_transformer(path)


@pytest.mark.parametrize("load", [load_transformer, load_vae])
@pytest.mark.parametrize(
    "fault", ["absent", "empty", "text", "cut in the data", "cut in the header"]
)
def test_damaged_file_is_one_line(load, fault, tmp_path):
    whole = TRANSFORMERS[0].read_bytes()
    content = {
        "empty": b"",
        "text": b"not a checkpoint at all",
        "cut in the data": whole[:-1000],
        "cut in the header": whole[:1000],
    }
    path = tmp_path / "model.safetensors"
    if fault in content:
        path.write_bytes(content[fault])
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: (no such|not a whole)"
    ) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_files_of_the_other_kind_are_refused():
    with pytest.raises(CheckpointError, match=r"encoder\.conv_in\.weight is missing"):
        load_vae(TRANSFORMERS[0])
    with pytest.raises(CheckpointError, match=r"img_in\.weight is missing"):
        load_transformer(VAE)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    target = tmp_path / "model.safetensors"
    target.write_bytes(b"old")

    def fail(self, parameters):
        raise OSError("disk full")

    monkeypatch.setattr(Row, "join", fail)
    with pytest.raises(OSError, match="disk full"):
        load_transformer(TRANSFORMERS[0]).to_official(target)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_model_with_extra_layers_is_not_written(tmp_path):
    model = load_transformer(TRANSFORMERS[0])
    model.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"adapter\.bias"):
        model.to_official(tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_vae_encodes_and_decodes_like_the_reference():
    vae = load_vae(VAE, torch_dtype=torch.float32)
    io = load_file(REFERENCE / "vae_io.safetensors")
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    mean = scale * (vae.encode(io["image"]).latent_dist.mean - shift)
    assert relative_error(mean, io["latent_mean"]) <= 1e-5
    decoded = vae.decode(io["latent_mean"] / scale + shift).sample
    assert relative_error(decoded, io["decoded"]) <= 1e-5


def test_vae_to_official_is_identical(tmp_path):
    save_vae(load_vae(VAE), tmp_path / "vae.safetensors")
    assert_same_tensors(VAE, tmp_path / "vae.safetensors")


def test_vae_config_reaches_the_model(tmp_path):
    vae = load_vae(VAE, norm_num_groups=16, scaling_factor=0.5)
    assert (vae.config.norm_num_groups, vae.config.scaling_factor) == (16, 0.5)
