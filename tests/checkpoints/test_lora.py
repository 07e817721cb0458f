"""LoRA files: every layout gives the reference's output, and each turns into the others exactly."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from step1x_edit import Editor, RuntimeConfig
from step1x_edit.checkpoints.lora_convert import convert
from step1x_edit.checkpoints.official import load_transformer
from step1x_edit.errors import CheckpointError, InvalidRequest
from step1x_edit.model.lora_layouts import layer_of, read_header
from step1x_edit.model.lora_tensors import read_lora
from step1x_edit.runtime.precision import StoredLinear

from ..lora_files import write_random_lora
from ..runtime.loading import store_linears

REFERENCE = Path(__file__).parents[1] / "reference"
KOHYA = REFERENCE / "lora_v1p1_kohya.safetensors"
INPUTS = ("hidden_states", "encoder_hidden_states", "timestep", "img_ids", "txt_ids")
LAYOUTS = ("kohya", "peft", "comfyui")
QKV = "single_transformer_blocks.0.attn.to_"
FUSED = {"fp8": 0.1, "int8": 0.03, "int4": 0.3}
"""Relative error of the output with a LoRA fused into stored weights, against beside them."""


def relative_error(got, wanted):
    return ((got - wanted).norm() / wanted.norm()).item()


def output_of(model):
    io = load_file(REFERENCE / "transformer_v1p1_io.safetensors")
    inputs = {name: io[name] for name in INPUTS}
    with torch.no_grad():
        return model(**inputs, prompt_embeds_mask=io["mask"]).sample


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    """The reference transformer in a pipeline."""
    made = Editor.load(str(tiny_model)).pipeline
    made.register_modules(
        transformer=load_transformer(
            REFERENCE / "transformer_v1p1_official.safetensors", torch_dtype=torch.float32
        )
    )
    return made


@pytest.fixture(scope="module")
def plain(pipeline):
    """Its output without a LoRA."""
    return output_of(pipeline.transformer)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The reference LoRA in each layout."""
    folder = tmp_path_factory.mktemp("loras")
    made = {layout: folder / f"{layout}.safetensors" for layout in LAYOUTS}
    for layout, path in made.items():
        convert(KOHYA, path, layout)
    return made


def contents(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def assert_same_file(one, other):
    (one, one_metadata), (other, other_metadata) = contents(one), contents(other)
    assert one_metadata == other_metadata
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert tensor.shape == other[name].shape, name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8)), name  # fmt: skip  # noqa: E501


def delta(lora, name):
    """The update of one of our layers, in float64."""
    layer = lora.layers[name]
    return float(layer.scale) * layer.up.double() @ layer.down.double()


# ---- on the model


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_reference_and_goes_without_a_trace(pipeline, plain, files, layout):
    model = pipeline.transformer
    wanted = load_file(REFERENCE / "lora_v1p1_io.safetensors")["output"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = {name: part.requires_grad for name, part in model.named_parameters()}

    pipeline.load_lora_weights(files[layout])
    beside = output_of(model)
    assert relative_error(beside, wanted) <= 1e-5
    assert relative_error(plain, wanted) > 1e-2  # it does something
    pipeline.fuse_lora()
    assert relative_error(output_of(model), wanted) <= 1e-5
    pipeline.unfuse_lora()
    assert torch.equal(output_of(model), beside)
    pipeline.fuse_lora(lora_scale=0.5)
    pipeline.unload_lora_weights()

    assert torch.equal(output_of(model), plain)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {name: part.requires_grad for name, part in model.named_parameters()} == trainable


def test_plain_diffusers_reads_our_peft_file(pipeline, files):
    wanted = load_file(REFERENCE / "lora_v1p1_io.safetensors")["output"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        pipeline.transformer.load_lora_adapter(files["peft"], use_safetensors=True)
    try:
        assert relative_error(output_of(pipeline.transformer), wanted) <= 1e-5
    finally:
        pipeline.transformer.unload_lora()


def test_several_at_once_add_up_with_their_weights(pipeline, plain, files, tmp_path):
    """Against weights merged by hand, with ranks and alphas that differ from layer to layer."""
    draw = torch.Generator().manual_seed(1)
    tensors = {}
    for number, (name, (rows, columns)) in enumerate(
        {"proj_out": (64, 96), f"{QKV}q": (96, 96), "x_embedder": (96, 64)}.items()
    ):
        rank = number + 1
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, columns, generator=draw) * 0.1
        tensors[f"{name}.lora_B.weight"] = torch.randn(rows, rank, generator=draw) * 0.1
        tensors[f"{name}.alpha"] = torch.tensor(0.5 + number)
    del tensors["proj_out.alpha"]  # counts as the rank
    save_file(tensors, tmp_path / "other.safetensors")
    weights = {"one": -0.7, "two": 1.5}
    pipeline.load_lora_weights(files["kohya"], adapter_name="one")
    pipeline.load_lora_weights(tmp_path / "other.safetensors", adapter_name="two")
    pipeline.set_adapters([*weights], [*weights.values()])
    together = output_of(pipeline.transformer)
    with pytest.raises(InvalidRequest, match="'one' is taken"):
        pipeline.load_lora_weights(files["kohya"], adapter_name="one")
    pipeline.disable_lora()
    assert torch.equal(output_of(pipeline.transformer), plain)
    pipeline.unload_lora_weights()

    merged = load_transformer(
        REFERENCE / "transformer_v1p1_official.safetensors", torch_dtype=torch.float32
    )
    sources = {"one": files["peft"], "two": tmp_path / "other.safetensors"}
    for adapter, path in sources.items():
        _, lora = read_lora(path)
        for name in lora.layers:
            weight = merged.get_submodule(name).weight.data
            weight += (weights[adapter] * delta(lora, name)).float()
    assert relative_error(together, output_of(merged)) <= 1e-5


@pytest.mark.parametrize("precision", ["fp8", "int8", "int4"])
def test_weights_stored_in_few_bits(tiny_model, files, precision):
    """The LoRA computes in bfloat16 beside them, or is added to them, and goes without a trace."""
    pipeline = Editor.load(str(tiny_model)).pipeline
    model = load_transformer(
        REFERENCE / "transformer_v1p1_official.safetensors", torch_dtype=torch.bfloat16
    )
    store_linears(model, precision)
    bits = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pipeline.register_modules(transformer=model)
    io = load_file(REFERENCE / "transformer_v1p1_io.safetensors")
    inputs = {name: io[name].bfloat16() for name in INPUTS[:2]} | {n: io[n] for n in INPUTS[2:]}

    def output():
        with torch.no_grad():
            return model(**inputs, prompt_embeds_mask=io["mask"]).sample.float()

    def taken_off():
        after = model.state_dict()
        return after.keys() == bits.keys() and all(after[n].equal(bits[n]) for n in bits)

    before = output()
    wanted = load_file(REFERENCE / "lora_v1p1_io.safetensors")["output"] - io["output"]
    pipeline.load_lora_weights(files["kohya"])
    layer = model.get_submodule(f"{QKV}q")
    assert isinstance(layer.base_layer, StoredLinear)
    assert layer.lora_A["default_0"].weight.dtype == torch.bfloat16
    # What the LoRA changes is what it changes in float32, up to the error of the storage.
    beside = output()
    assert relative_error(beside - before, wanted) < 0.5
    pipeline.fuse_lora()
    assert not layer.base_layer.weight.equal(bits[f"{QKV}q.weight"])
    fused = output()
    # The sum is stored in few bits, too.
    assert 0 < relative_error(fused, beside) < FUSED[precision]
    pipeline.unfuse_lora()
    assert torch.equal(output(), beside)
    pipeline.fuse_lora()
    assert torch.equal(output(), fused)
    pipeline.unload_lora_weights()
    assert torch.equal(output(), before)
    assert taken_off()


def test_weights_on_disk_cannot_be_fused_into(tiny_model, tmp_path):
    lora = write_random_lora(tmp_path / "a.safetensors", tiny_model / "transformer")
    runtime = RuntimeConfig.checked(offload="disk", lora=[str(lora)])
    pipeline = Editor.load(str(tiny_model), runtime).pipeline
    with pytest.raises(InvalidRequest, match=r"waits elsewhere .*: leave it beside") as refusal:
        pipeline.fuse_lora()
    assert "\n" not in str(refusal.value)
    assert not pipeline.num_fused_loras


# ---- from layout to layout


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "no alpha", "some alphas"])
def test_round_the_layouts_is_identical(kind, tmp_path):
    tensors, metadata = contents(KOHYA)
    if kind == "bfloat16":
        tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    if "alpha" in kind:
        left_out = [name for name in tensors if name.endswith(".alpha")]
        tensors = {
            name: tensor
            for name, tensor in tensors.items()
            if name not in left_out[: None if kind == "no alpha" else 3]
        }
    path = tmp_path / "0.safetensors"
    save_file(tensors, path, metadata)
    for number, layout in enumerate(("peft", "comfyui", "kohya"), 1):
        was = path
        path = tmp_path / f"{number}.safetensors"
        convert(was, path, layout)
        assert read_header(path).layout == layout
    assert_same_file(tmp_path / "0.safetensors", path)


def trained_apart(path, ranks, *, scales=None, dtype=torch.float32):
    """A PEFT file whose query, key, value and MLP of one block have downs of their own."""
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    rows = {f"{QKV}{part}": 96 for part in "qkv"} | {"single_transformer_blocks.0.proj_mlp": 384}
    for name, rank in zip(rows, ranks, strict=True):
        if rank:
            for part, shape in (("A", (rank, 96)), ("B", (rows[name], rank))):
                # Whole numbers: their products add up exactly in any order.
                numbers = torch.randint(-9, 10, shape, generator=draw).to(dtype)
                tensors[f"transformer.{name}.lora_{part}.weight"] = numbers
    metadata = {}
    if scales:
        alphas = {
            f"^{name}": scale * rank
            for name, rank, scale in zip(rows, ranks, scales, strict=True)
            if rank
        }
        config = {"transformer.r": 2, "transformer.lora_alpha": 1.0}
        metadata["lora_adapter_metadata"] = json.dumps(
            config | {"transformer.alpha_pattern": alphas}
        )
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("ranks", "scales"),
    [
        ((2, 2, 2, 2), None),
        ((1, 3, 2, 5), (0.5,) * 4),
        ((2, 0, 2, 0), (0.25,) * 4),
        ((0, 0, 0, 3), None),
        ((2, 2, 2, 2), (0.5, 1, 2, 0.25)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_trained_apart_are_stacked_exactly(ranks, scales, dtype, tmp_path):
    one, fused, other = (tmp_path / f"{name}.safetensors" for name in ("one", "fused", "other"))
    trained_apart(one, ranks, scales=scales, dtype=dtype)
    convert(one, fused, "kohya")
    _, lora = read_lora(one)
    _, kohya = read_lora(fused)
    assert [*kohya.layers] == ["single_blocks.0.linear1"]
    linear1 = delta(kohya, "single_blocks.0.linear1").split([96, 96, 96, 384])
    layer = layer_of("single_blocks.0.linear1", "kohya")
    for name, rows in zip(layer.ours, linear1, strict=True):
        wanted = delta(lora, name) if name in lora.layers else torch.zeros_like(rows)
        assert torch.equal(rows, wanted), name
    convert(fused, other, "peft")
    _, again = read_lora(other)
    assert again.layers.keys() == lora.layers.keys()
    for name, update in lora.layers.items():
        assert torch.equal(update.down, again.layers[name].down)
        assert torch.equal(delta(lora, name), delta(again, name))
        if not scales or len(set(scales)) == 1:
            assert torch.equal(update.up, again.layers[name].up)
    convert(other, tmp_path / "twice.safetensors", "kohya")
    assert_same_file(fused, tmp_path / "twice.safetensors")


def test_scales_that_would_round_are_refused(tmp_path):
    trained_apart(tmp_path / "a.safetensors", (3, 3, 3, 3), scales=(1, 1 / 3, 1, 1))
    with pytest.raises(CheckpointError, match="without rounding") as refusal:
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya")
    assert "\n" not in str(refusal.value)
    assert [*tmp_path.iterdir()] == [tmp_path / "a.safetensors"]


def test_the_final_layers_halves_are_swapped(tmp_path):
    up = torch.arange(192.0)[:, None]
    names = [f"diffusion_model.final_layer.adaLN_modulation.1.lora_{part}.weight" for part in "AB"]
    save_file({names[0]: torch.ones(1, 96), names[1]: up}, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "peft")
    _, lora = read_lora(tmp_path / "b.safetensors")
    assert torch.equal(lora.layers["norm_out.linear"].up, torch.cat([up[96:], up[:96]]))
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "comfyui")
    assert_same_file(tmp_path / "a.safetensors", tmp_path / "c.safetensors")


# ---- spellings


def respelt(path, files, layout, change, metadata=None):
    tensors, own = contents(files[layout])
    changed = {change(name): tensor.contiguous() for name, tensor in tensors.items()}
    save_file(changed, path, own if metadata is None else metadata)
    return path


def assert_same_layers(one, other):
    (_, one), (_, other) = read_lora(one), read_lora(other)
    assert one.layers.keys() == other.layers.keys()
    for name, update in one.layers.items():
        assert torch.equal(update.down, other.layers[name].down)
        assert torch.equal(update.up, other.layers[name].up)
        assert update.scale == other.layers[name].scale


def test_other_spellings(files, tmp_path):
    path = tmp_path / "a.safetensors"

    def old(name):
        return name.replace("lora_A", "lora_down").replace("lora_B", "lora_up")

    assert_same_layers(respelt(path, files, "comfyui", old), files["comfyui"])
    assert read_header(path).layout == "comfyui"
    bare = respelt(path, files, "peft", lambda name: name.removeprefix("transformer."))
    assert_same_layers(bare, files["peft"])
    default = respelt(path, files, "peft", lambda name: name.replace(".weight", ".default.weight"))
    assert_same_layers(default, files["peft"])


def test_a_file_of_pefts_own_needs_its_config(files, tmp_path):
    path = tmp_path / "adapter_model.safetensors"

    def own(name):
        return name.replace("transformer.", "base_model.model.", 1)

    respelt(path, files, "peft", own, metadata={})
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        read_lora(path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"r": 4, "lora_alpha": 2, "alpha_pattern": {}}))
    assert_same_layers(path, files["peft"])
    config.write_text(json.dumps({"r": 4, "lora_alpha": 2, "use_rslora": True}))
    with pytest.raises(CheckpointError, match="use_rslora"):
        read_lora(path)


# ---- what is refused


def widened(tensors):
    return {
        name: torch.zeros(4, 3072) if name.endswith("lora_down.weight") else tensor
        for name, tensor in tensors.items()
        if "img_attn_proj" in name
    }


def with_nan(tensors):
    tensors["lora_unet_single_blocks_0_linear2.lora_up.weight"][1, 1] = torch.nan
    return tensors


def without(part):
    return lambda tensors: {
        name: tensor
        for name, tensor in tensors.items()
        if name != f"lora_unet_single_blocks_0_linear2.lora_{part}.weight"
    }


def renamed(old, new):
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "metadata", "says"),
    [
        (widened, {}, r"another model, 2 of 2 layers.*img_attn\.proj \(96 × 3072 instead of 96"),
        (renamed("single_blocks_2", "single_blocks_7"), {}, r"3 of 29 layers.*no such layer"),
        (renamed("img_attn", "picture_attn"), {}, r"12 of 87 tensors.*picture_attn_proj\.alpha"),
        (renamed("lora_unet_double_blocks_0", "lora_te1_text"), {}, "30 of 87 tensors"),
        (with_nan, {}, r"linear2\.lora_up\.weight holds .*NaN"),
        (without("up"), {}, r"linear2 has only alpha and down"),
        (without("down"), {}, r"linear2 has only alpha and up"),
        (None, {"modelspec.architecture": "flux-1-dev/lora"}, r"another model.*flux-1-dev"),
        (None, {"ss_base_model_version": "flux1"}, "another model.*flux1"),
        (lambda tensors: {"a": torch.zeros(2)}, {}, "1 of 1 tensors"),
        (lambda tensors: {}, {}, "holds no tensors|not a whole"),
    ],
)  # fmt: skip
def test_bad_files_are_one_line_and_change_nothing(
    pipeline, plain, tmp_path, change, metadata, says
):
    tensors = load_file(KOHYA)
    path = tmp_path / "bad.safetensors"
    save_file(tensors if change is None else change(tensors), path, metadata)
    with pytest.raises(CheckpointError, match=says) as refusal:
        pipeline.load_lora_weights(path)
    assert "\n" not in str(refusal.value)
    assert "bad.safetensors" in str(refusal.value)
    assert torch.equal(output_of(pipeline.transformer), plain)


def test_qwen_image_names_are_refused(tmp_path):
    tensors = {
        f"transformer.transformer_blocks.{block}.img_mod.1.lora_{part}.weight": torch.zeros(4, 4)
        for block in range(3)
        for part in "AB"
    }
    save_file(tensors, tmp_path / "qwen.safetensors")
    with pytest.raises(CheckpointError, match=r"6 of 6 tensors.*img_mod\.1"):
        read_header(tmp_path / "qwen.safetensors")


@pytest.mark.parametrize(
    "fault", ["absent", "empty", "text", "cut in the data", "cut in the header"]
)
def test_damaged_files_are_one_line(fault, tmp_path):
    whole = KOHYA.read_bytes()
    content = {
        "empty": b"",
        "text": b"not a checkpoint at all",
        "cut in the data": whole[:-1000],
        "cut in the header": whole[:1000],
    }
    path = tmp_path / "lora.safetensors"
    if fault in content:
        path.write_bytes(content[fault])
    with pytest.raises(
        CheckpointError, match=r"lora\.safetensors: (no such|not a whole)"
    ) as caught:
        read_header(path)
    assert "\n" not in str(caught.value)
