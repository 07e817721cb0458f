"""The pipeline on a tiny random model folder, laid out as the published ones are."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from step1x_edit.errors import InvalidRequest
from step1x_edit.model.guidance import prepare_ids, schedule
from step1x_edit.model.instruction import InstructionEncoder
from step1x_edit.model.latents import keep_reference, unpack
from step1x_edit.model.pipeline import Step1XEditPipeline
from step1x_edit.model.processor import PictureProcessor
from step1x_edit.model.transformer import Step1XEditTransformer2DModel

from ..tiny_model import SETTINGS, write_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def pipeline(folder):
    loaded = Step1XEditPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def difference(a, b) -> float:
    a, b = (torch.as_tensor(np.asarray(x, np.float32)) for x in (a, b))
    return float((a - b).norm() / b.norm())


def test_published_folder_loads_as_our_classes(folder, pipeline):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["transformer"][0] == "diffusers"
    assert index["processor"] == ["transformers", "Qwen2_5_VLProcessor"]
    assert type(pipeline.transformer) is Step1XEditTransformer2DModel
    assert type(pipeline.processor) is PictureProcessor
    assert {name: pipeline.config[name] for name in SETTINGS} == SETTINGS
    assert pipeline.instruction.max_length == 96


def test_folder_without_settings_has_those_of_the_release(tmp_path):
    folder = write_tiny_model(tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    kept = {name: value for name, value in index.items() if name not in SETTINGS}
    (folder / "model_index.json").write_text(json.dumps(kept))
    config = Step1XEditPipeline.from_pretrained(folder).config
    assert (config["num_inference_steps"], config["guidance_scale"], config["size_level"]) == (
        28,
        6.0,
        512,
    )


@torch.no_grad()
def test_six_stages_are_the_formulas_of_the_release(pipeline):
    """The same edit, written out with nothing but the networks."""
    source = picture(64, 48)
    steps, scale = 3, 4.0
    made = pipeline(
        source, "make it red", negative_prompt="blue", num_inference_steps=steps, size_level=64,
        guidance_scale=scale, generator=generator(5), output_type="pt",
    ).images  # fmt: skip
    height, width = made.shape[-2:]
    assert (width, height) == (64, 48)  # w > h: ceil(sqrt(64² · 4/3)) = 74 → 64; 56 → 48

    small = source.resize((width, height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.asarray(small, np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    mean = pipeline.vae.encode(pixels).latent_dist.mean
    latents = 0.3611 * (mean - 0.1159)  # (1, 16, 6, 8)

    def pack(x):
        patches = x.unfold(2, 2, 2).unfold(3, 2, 2)  # (1, 16, 3, 4, 2, 2)
        return patches.permute(0, 2, 3, 1, 4, 5).reshape(1, -1, 64)

    reference = pack(latents)
    x = pack(torch.randn(latents.shape, generator=generator(5)))
    encoder = InstructionEncoder(pipeline.text_encoder, pipeline.processor, pipeline.instruction)
    img_ids, txt_ids = prepare_ids(96, (3, 4), (3, 4), "v1.1")
    features = [
        encoder.encode(encoder.tokenize([small], [words])) for words in ("make it red", "blue")
    ]
    for time, following in pairwise(schedule(steps, 12).tolist()):
        velocities = [
            pipeline.transformer(
                torch.cat([x, reference], 1), f.features, f.mask, torch.tensor([time]),
                img_ids, txt_ids, return_dict=False,
            )[0][:, :12]
            for f in features
        ]  # fmt: skip
        conditional, unconditional = velocities
        guidance = conditional - unconditional
        if time > 0.93:
            length = guidance.norm(dim=-1, keepdim=True)
            guidance = guidance / torch.where(length > 1, length**0.4, torch.ones(()))
        x = x + (following - time) * (unconditional + scale * guidance)
    decoded = pipeline.vae.decode(unpack(x, 3) / 0.3611 + 0.1159).sample
    assert difference(made, (decoded.clamp(-1, 1) + 1) / 2) < 1e-5


def test_batch_gives_what_single_calls_give(pipeline):
    pictures = [picture(64, 64, 1), picture(96, 48, 2), picture(64, 64, 3)]
    prompts = ["make it red", "把它变成黑白", "remove the car"]
    together = pipeline(
        pictures, prompts, generator=[generator(i) for i in range(3)], output_type="np"
    ).images
    assert [image.shape for image in together] == [(64, 64, 3), (32, 80, 3), (64, 64, 3)]
    for i in range(3):
        alone = pipeline(pictures[i], prompts[i], generator=generator(i), output_type="np").images
        assert difference(together[i], alone[0]) < 1e-5


def test_several_results_of_one_picture_differ_and_come_in_order(pipeline):
    pair = pipeline(
        picture(64, 64), ["a", "b"], num_images_per_prompt=2, generator=generator(0),
        output_type="latent",
    ).images  # fmt: skip
    assert len(pair) == 4
    assert difference(pair[0], pair[1]) > 0.1
    noise = generator(0)
    singles = [
        pipeline(picture(64, 64), words, generator=noise, output_type="latent").images[0]
        for words in "aabb"
    ]
    for one, other in zip(pair, singles, strict=True):
        assert difference(one, other) < 1e-5


def test_both_names_of_guidance(pipeline):
    call = {"image": picture(64, 64), "prompt": "a", "output_type": "latent"}
    one = pipeline(**call, guidance_scale=5.0, generator=generator(1)).images[0]
    other = pipeline(**call, true_cfg_scale=5.0, generator=generator(1)).images[0]
    own = pipeline(**call, generator=generator(1)).images[0]
    assert torch.equal(one, other)
    assert difference(one, own) > 1e-3
    with pytest.raises(InvalidRequest, match=r"5\.0 and true_cfg_scale 4\.0 are one setting"):
        pipeline(**call, guidance_scale=5.0, true_cfg_scale=4.0)


def test_without_guidance_one_row_is_computed(pipeline):
    rows = []
    handle = pipeline.transformer.register_forward_pre_hook(
        lambda _, __, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    try:
        for scale in (-1, 1):
            pipeline(picture(64, 64), "a", guidance_scale=scale, output_type="latent")
    finally:
        handle.remove()
    assert rows == [1, 1, 2, 2]


def test_seed_decides_the_picture(pipeline):
    def made(seed):
        return pipeline(
            picture(64, 64), "a", generator=generator(seed), output_type="latent"
        ).images[0]

    assert torch.equal(made(3), made(3))
    assert difference(made(3), made(4)) > 0.1


def test_latents_stand_for_the_noise(pipeline):
    call = {"image": picture(64, 64), "prompt": "a", "output_type": "latent"}
    noise = torch.randn(1, 16, 8, 8, generator=generator(3))
    packed = noise.reshape(1, 16, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 16, 64)
    drawn = pipeline(**call, generator=generator(3)).images[0]
    assert torch.equal(pipeline(**call, latents=packed).images[0], drawn)


def test_callback_sees_every_step_and_may_change_the_latents(pipeline):
    seen = []

    def look(pipe, step, time, tensors):
        assert pipe is pipeline
        seen.append((step, time, tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else None

    made = pipeline(
        picture(64, 64), "a", num_inference_steps=4, output_type="latent",
        callback_on_step_end=look,
    ).images  # fmt: skip
    assert [step for step, _, _ in seen] == [0, 1, 2, 3]
    assert [time for _, time, _ in seen] == schedule(4, 16).tolist()[1:]
    assert {shape for _, _, shape in seen} == {(1, 16, 64)}
    assert not made[0].any()


def test_a_folder_says_the_shift_and_what_counts_as_unchanged(tmp_path):
    index = write_tiny_model(tmp_path) / "model_index.json"
    settings = {"time_shift": 4.0, "keep_threshold": 0.01}
    index.write_text(json.dumps(json.loads(index.read_text()) | settings))
    own = Step1XEditPipeline.from_pretrained(tmp_path)
    own.set_progress_bar_config(disable=True)
    source, times = picture(64, 64), []
    rendered = own(source, "a", output_type="latent", return_references=True).references[0]
    offsets = torch.full_like(rendered, 0.5)
    offsets[:8] = 0.05  # a mean square of 0.0025

    def look(_, step, time, tensors):
        times.append(time)
        return {"latents": (rendered + offsets)[None]}

    made = own(source, "a", output_type="latent", callback_on_step_end=look).images[0]
    assert times == pytest.approx([0.8, 0.0])
    assert torch.equal(made[:8], rendered[:8])
    assert torch.equal(made[8:], (rendered + offsets)[8:])


def test_what_changed_a_little_all_over_is_not_taken_back():
    reference = torch.zeros(3, 100, 64)
    tokens = torch.full_like(reference, 0.05)
    tokens[1, :90] = 0.15  # between kept and changed
    tokens[2, 90:] = 0.5
    kept = keep_reference(tokens, reference, 0.01)
    assert torch.equal(kept[:2], tokens[:2])
    assert not kept[2, :90].any()
    assert torch.equal(kept[2, 90:], tokens[2, 90:])


def test_output_types_hold_the_same_picture(pipeline):
    call = {"image": picture(64, 80), "prompt": "a"}
    pil, array, tensor, latent = (
        pipeline(**call, generator=generator(0), output_type=kind).images
        for kind in ("pil", "np", "pt", "latent")
    )
    assert pil[0].size == (48, 64)
    assert array[0].shape == (64, 48, 3)
    assert tensor.shape == (1, 3, 64, 48)
    assert latent[0].shape == (12, 64)
    assert 0 <= array[0].min() < array[0].max() <= 1
    assert np.array_equal(array[0], tensor[0].permute(1, 2, 0).numpy())
    assert np.array_equal(np.asarray(pil[0]), (array[0] * 255).round().astype(np.uint8))
    assert np.array_equal(
        pipeline(**call, generator=generator(0), output_type="np", return_dict=False)[0][0],
        array[0],
    )


@torch.no_grad()
def test_references_are_the_sources_as_the_autoencoder_renders_them(pipeline):
    source = picture(64, 64)
    made = pipeline([source, source], "a", output_type="pt", return_references=True)
    pixels = torch.from_numpy(np.asarray(source, np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    mean = pipeline.vae.encode(pixels).latent_dist.mean
    rendered = (pipeline.vae.decode(mean).sample.clamp(-1, 1) + 1) / 2
    for reference in made.references:
        assert difference(reference[None], rendered) < 1e-5
    assert pipeline(source, "a", output_type="latent").references is None


@torch.no_grad()
def test_several_results_encode_and_render_their_picture_once(pipeline, monkeypatch):
    encoded = []
    encode = pipeline.vae.encode
    monkeypatch.setattr(pipeline.vae, "encode", lambda x: encoded.append(len(x)) or encode(x))
    made = pipeline(
        [picture(64, 64, 1), picture(64, 64, 2)], "a", num_images_per_prompt=3, output_type="np",
        return_references=True,
    )  # fmt: skip
    assert encoded == [2]
    assert len(made.images) == len(made.references) == 6
    assert made.references[0] is made.references[2]
    assert difference(made.references[2], made.references[3]) > 0.01
    assert difference(made.images[0], made.images[1]) > 0.01


def test_text_to_image(pipeline):
    drawn = pipeline(prompt="a red car", generator=generator(0)).images[0]
    assert drawn.size == (64, 64)  # the model's own size level
    tokens = []
    handle = pipeline.transformer.register_forward_pre_hook(
        lambda _, __, kwargs: tokens.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
    )
    try:
        wide = pipeline(prompt=["a red car", "一只狗"], width=96, height=32).images
    finally:
        handle.remove()
    assert [image.size for image in wide] == [(96, 32), (96, 32)]
    assert set(tokens) == {12}, "no reference tokens"


def test_first_release_edits_but_does_not_draw(tmp_path):
    pipeline = Step1XEditPipeline.from_pretrained(write_tiny_model(tmp_path, version="v1.0"))
    assert pipeline.transformer.version == "v1.0"
    assert pipeline(picture(64, 64), "a").images[0].size == (64, 64)
    with pytest.raises(InvalidRequest, match=r"v1\.0 .* picture"):
        pipeline(prompt="a red car")


@torch.no_grad()
def test_bfloat16_networks_with_a_float32_decode(folder):
    pipeline = Step1XEditPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    call = {"image": picture(64, 64), "prompt": "a"}
    latent = pipeline(**call, generator=generator(0), output_type="latent").images[0]
    made = pipeline(**call, generator=generator(0), output_type="pt").images
    for part in (pipeline.transformer, pipeline.text_encoder, pipeline.vae):
        assert {p.dtype for p in part.parameters()} == {torch.bfloat16}
    assert latent.dtype == torch.float32, "the walk itself is not rounded"
    decoded = pipeline.vae.float().decode(unpack(latent[None], 4) / 0.3611 + 0.1159).sample
    assert difference(made, (decoded.clamp(-1, 1) + 1) / 2) < 1e-5


def test_saved_folder_loads_and_edits_the_same(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    again = Step1XEditPipeline.from_pretrained(tmp_path)
    assert again.instruction == pipeline.instruction
    assert {name: again.config[name] for name in SETTINGS} == SETTINGS
    call = {"image": picture(64, 64), "prompt": "a 'b'", "output_type": "latent"}
    one, other = (p(**call, generator=generator(0)).images[0] for p in (pipeline, again))
    assert torch.equal(one, other)


def test_a_call_changes_no_component(pipeline):
    def state():
        parts = (pipeline.transformer, pipeline.text_encoder, pipeline.vae)
        return [tensor.clone() for part in parts for tensor in part.state_dict().values()]

    before, config = state(), dict(pipeline.config)
    pipeline(picture(64, 64), "a", num_inference_steps=1, guidance_scale=3)
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    assert dict(pipeline.config) == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": None}, "no prompt"),
        ({"num_inference_steps": 0}, "0 steps"),
        ({"num_images_per_prompt": 0}, "0 pictures"),
        ({"prompt": ["a"] * 3, "image": [picture(64, 64)] * 2}, "2 pictures for a batch of 3"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for a batch of 1"),
        ({"image": []}, "0 pictures"),
        ({"generator": [generator(0)] * 3}, "3 generators for 1 results"),
        ({"height": 40}, r"64 × 40: .* multiple of 16"),
        ({"size_level": 0}, "size"),
        ({"image": picture(1000, 10)}, "1000"),
        ({"prompt": "long " * 40}, "over this model's limit of 96"),
        ({"latents": torch.zeros(1, 3, 64)}, "latents"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused_in_one_line(pipeline, arguments, message):
    with pytest.raises(InvalidRequest, match=message) as error:
        pipeline(**{"image": picture(64, 64), "prompt": "a"} | arguments)
    assert "\n" not in str(error.value)
