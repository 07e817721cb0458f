"""The network against the reference tensors, against diffusers' FLUX, and against itself."""

from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import attention_backend
from safetensors.torch import load_file

from step1x_edit.model.attention import (
    RotaryRMSNorm,
    attend_by_matmul,
    prefers_matmul,
    rotary_table,
)
from step1x_edit.model.config import tiny_transformer
from step1x_edit.model.connector import sinusoid
from step1x_edit.model.guidance import prepare_ids
from step1x_edit.model.transformer import Step1XEditTransformer2DModel

REFERENCE = Path(__file__).parents[1] / "reference"
VERSIONS = {"v1.0": "v1p0", "v1.1": "v1p1"}


def relative_error(got, wanted):
    return ((got - wanted).norm() / wanted.norm()).item()


@pytest.fixture(params=VERSIONS)
def reference(request):
    name = VERSIONS[request.param]
    model = Step1XEditTransformer2DModel.from_official(
        REFERENCE / f"transformer_{name}_official.safetensors", torch_dtype=torch.float32
    )
    assert model.version == request.param
    return model, load_file(REFERENCE / f"transformer_{name}_io.safetensors")


def tiny(**changes):
    torch.manual_seed(0)
    return Step1XEditTransformer2DModel(**tiny_transformer(**changes))


def tiny_inputs(batch=2, text=5, rows=3, columns=2):
    generator = torch.Generator().manual_seed(1)
    img_ids, txt_ids = prepare_ids(text, (rows, columns), (rows, columns))
    mask = torch.ones(batch, text, dtype=torch.long)
    mask[-1, text // 2 :] = 0
    return {
        "hidden_states": torch.randn(batch, len(img_ids), 64, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, 40, generator=generator),
        "prompt_embeds_mask": mask,
        "timestep": torch.linspace(0.2, 0.9, batch),
        "img_ids": img_ids,
        "txt_ids": txt_ids,
    }


@torch.no_grad()
def test_connector_gives_the_reference_context_and_pooled_vector(reference):
    model, io = reference
    context, pooled = model.connector(io["encoder_hidden_states"], io["timestep"], io["mask"])
    assert relative_error(context, io["connector_context"]) <= 1e-5
    assert relative_error(pooled, io["connector_pooled"]) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("shared_ids", [True, False], ids=["one table", "table per row"])
def test_edit_output_is_the_reference_output(reference, shared_ids):
    model, io = reference
    row = 0 if shared_ids else slice(None)
    output = model(
        io["hidden_states"],
        io["encoder_hidden_states"],
        io["mask"],
        io["timestep"],
        io["img_ids"][row],
        io["txt_ids"][row],
    ).sample
    assert relative_error(output, io["output"]) <= 1e-5


@torch.no_grad()
def test_text_to_image_output_is_the_reference_output(reference):
    model, io = reference
    img_ids, txt_ids = prepare_ids(12, (6, 4))
    (output,) = model(
        io["hidden_states"][:, :24],
        io["encoder_hidden_states"],
        io["mask"],
        io["timestep"],
        img_ids,
        txt_ids,
        return_dict=False,
    )
    assert relative_error(output, io["t2i_output"]) <= 1e-5


@torch.no_grad()
def test_published_folder_loads_as_v1p1_and_gives_the_reference_output():
    model = Step1XEditTransformer2DModel.from_pretrained(
        REFERENCE / "diffusers_v1p1" / "transformer", torch_dtype=torch.float32
    )
    io = load_file(REFERENCE / "transformer_v1p1_io.safetensors")
    assert model.version == "v1.1"
    output = model(
        io["hidden_states"],
        io["encoder_hidden_states"],
        io["mask"],
        io["timestep"],
        io["img_ids"],
        io["txt_ids"],
    ).sample
    assert relative_error(output, io["output"]) <= 1e-5


def test_saved_folder_comes_back_with_the_same_weights_and_version(tmp_path):
    model = tiny(connector_scale_factor=True)
    model.save_pretrained(tmp_path)
    again = Step1XEditTransformer2DModel.from_pretrained(tmp_path)
    assert again.version == "v1.0"
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def flux_of(model):
    """diffusers' FLUX with the trunk of `model` inside; its blocks have the same names."""
    config = model.config
    flux = FluxTransformer2DModel(
        in_channels=config.in_channels,
        num_layers=config.num_layers,
        num_single_layers=config.num_single_layers,
        attention_head_dim=config.attention_head_dim,
        num_attention_heads=config.num_attention_heads,
        joint_attention_dim=config.joint_attention_dim,
        pooled_projection_dim=config.vector_in_dim,
        axes_dims_rope=config.axes_dims_rope,
    )
    embedders = (
        ("time_embed.in_layer", "time_text_embed.timestep_embedder.linear_1"),
        ("time_embed.out_layer", "time_text_embed.timestep_embedder.linear_2"),
        ("vec_embed.in_layer", "time_text_embed.text_embedder.linear_1"),
        ("vec_embed.out_layer", "time_text_embed.text_embedder.linear_2"),
    )
    flux_name = {}
    for name in model.state_dict():
        if not name.startswith("connector."):
            flux_name[name] = name
            for ours, theirs in embedders:
                flux_name[name] = flux_name[name].replace(ours, theirs)
    flux.load_state_dict({flux_name[n]: v for n, v in model.state_dict().items() if n in flux_name})
    return flux, flux_name


def test_trunk_and_its_gradients_equal_diffusers_flux():
    model, inputs = tiny(), tiny_inputs()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm_" in name and name.endswith("weight") and parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)  # ones would hide a mistake in the norms' gradient
    flux, flux_name = flux_of(model)
    context, pooled = model.connector(
        inputs["encoder_hidden_states"], inputs["timestep"], inputs["prompt_embeds_mask"]
    )
    wanted = flux(
        inputs["hidden_states"],
        context.detach(),
        pooled.detach(),
        inputs["timestep"],
        inputs["img_ids"],
        inputs["txt_ids"],
    ).sample
    got = model(**inputs).sample
    assert relative_error(got, wanted) <= 1e-6

    wanted.square().sum().backward()
    got.square().sum().backward()
    theirs = dict(flux.named_parameters())
    for name, parameter in model.named_parameters():
        if name in flux_name:
            # A constant on all keys leaves attention as it is: the true gradient is zero.
            if name.endswith(("to_k.bias", "add_k_proj.bias")):
                continue
            assert relative_error(parameter.grad, theirs[flux_name[name]].grad) <= 1e-4, name


@pytest.mark.parametrize("per_row", [False, True])
def test_norm_and_turn_differentiates_like_its_plain_form(per_row):
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(2, 7, 3, 16, generator=generator, requires_grad=True)
    ids = torch.rand(*((2,) if per_row else ()), 7, 3, generator=generator) * 9
    table = rotary_table(ids, (4, 6, 6))
    norm = RotaryRMSNorm(16)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    upstream = torch.randn(heads.shape, generator=generator)

    got = norm(heads, table)
    got_grads = torch.autograd.grad(got, (heads, norm.weight), upstream)
    plain = torch.nn.functional.rms_norm(heads, (16,), norm.weight, eps=1e-6)
    turned = torch.view_as_complex(plain.unflatten(-1, (-1, 2))) * table
    wanted = torch.view_as_real(turned).flatten(-2)
    wanted_grads = torch.autograd.grad(wanted, (heads, norm.weight), upstream)

    assert relative_error(got, wanted) <= 1e-6
    for one, other in zip(got_grads, wanted_grads, strict=True):
        assert relative_error(one, other) <= 1e-6


def test_matmul_attention_equals_the_fused_kernel_under_a_mask():
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 9, 8, generator=generator).unbind()
    mask = torch.rand(2, 1, 9, 9, generator=generator) < 0.5
    mask[..., 0] = True
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert relative_error(attend_by_matmul(query, key, value, mask), wanted) <= 1e-6


def test_matmul_attention_is_for_short_bfloat16_training_on_a_cpu_alone():
    query = torch.zeros(1, 1, 8, 4, dtype=torch.bfloat16)
    assert not prefers_matmul(query)
    assert prefers_matmul(query.requires_grad_())
    assert not prefers_matmul(query.float())
    assert not prefers_matmul(query.expand(1, 1, 8, 4).repeat(1, 1, 1000, 1))


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs).sample.square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_gradient_checkpointing_gives_identical_gradients():
    model, inputs = tiny(), tiny_inputs()
    plain = gradients(model, inputs)
    model.enable_gradient_checkpointing()
    cheap = gradients(model, inputs)
    assert all(torch.equal(cheap[name], gradient) for name, gradient in plain.items())


def test_every_parameter_learns():
    for name, gradient in gradients(tiny(connector_scale_factor=True), tiny_inputs()).items():
        assert gradient.abs().sum() > 0, name


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_bfloat16_stays_near_float32_forward_and_backward(how):
    model, inputs = tiny(), tiny_inputs()
    wanted = model(**inputs).sample
    wanted_gradients = gradients(model, inputs)
    if how == "weights":
        model.to(torch.bfloat16)
        inputs = inputs | {
            name: inputs[name].bfloat16() for name in ("hidden_states", "encoder_hidden_states")
        }
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        got = model(**inputs).sample
        got_gradients = gradients(model, inputs)
    assert got.dtype == torch.bfloat16
    assert relative_error(got.float(), wanted) < 0.03
    for name in ("x_embedder.weight", "transformer_blocks.0.attn.to_q.weight", "proj_out.weight"):
        assert relative_error(got_gradients[name].float(), wanted_gradients[name]) < 0.1, name


def test_timestep_features_keep_float32_under_autocast():
    times = torch.tensor([0.7, 0.7004])
    with torch.autocast("cpu", torch.bfloat16):
        features = sinusoid(times, 8)
    assert features.dtype == torch.float32
    angle = 1000 * times.double()  # the first frequency is one
    torch.testing.assert_close(features[:, 0], angle.cos().float(), atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_row_without_real_text_is_finite_and_leaves_the_others_alone():
    model, inputs = tiny(), tiny_inputs()
    before = model(**inputs).sample
    inputs["prompt_embeds_mask"][1] = 0
    after = model(**inputs).sample
    assert after.isfinite().all()
    assert relative_error(after[0], before[0]) <= 1e-6


@torch.no_grad()
def test_attention_backend_can_be_switched():
    model, inputs = tiny(), tiny_inputs()
    before = model(**inputs).sample
    with attention_backend("native"):  # diffusers keeps the last backend for the whole process
        model.set_attention_backend("_native_math")
    backends = {block.attn.processor._attention_backend for block in model.transformer_blocks}
    assert {str(backend.value) for backend in backends} == {"_native_math"}
    assert relative_error(model(**inputs).sample, before) <= 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes_dims_rope": (4, 6, 4)}, "add up to 14, not to attention_head_dim 16"),
        ({"joint_attention_dim": 32}, "joint_attention_dim 32 differs"),
        ({"connector_heads_num": 5}, "not a multiple of connector_heads_num 5"),
        ({"guidance_embeds": True}, "guidance_embeds True"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Step1XEditTransformer2DModel(**tiny_transformer(**changes))
