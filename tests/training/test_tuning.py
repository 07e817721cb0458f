"""LoRA and full runs over tiny models of every release and layout."""

import os
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from step1x_edit.editor import Editor
from step1x_edit.errors import CheckpointError, InvalidRequest, MissingExtra, Step1XEditError
from step1x_edit.model.config import RELEASED_TRANSFORMER
from step1x_edit.model.lora_layouts import read_header
from step1x_edit.model.transformer import Step1XEditTransformer2DModel
from step1x_edit.request import EditRequest, RuntimeConfig
from step1x_edit.training import lora, optimizers
from step1x_edit.training.config import load
from step1x_edit.training.feature_batch import FeatureBatch
from step1x_edit.training.tuning import Tuning, example_generator, train
from step1x_edit.training.watching import Samples

from ..tiny_model import write_tiny_official
from ..tuning_runs import CAPTION, settings, write_config


def run_of(folder, model, **changes):
    folder.parent.mkdir(parents=True, exist_ok=True)
    return load(write_config(folder.with_suffix(".yaml"), settings(folder, model, **changes)))


def newest(folder):
    return torch.load(max((folder / "checkpoints").iterdir()))


def tensors_of(state):
    for optimizer in state["optimizers"]:
        for values in optimizer["state"].values():
            yield from values.values()
    yield from [*state["trained"].values(), *state["ema"].values()]


def assert_same_bits(one, other):
    pairs = zip(tensors_of(newest(one)), tensors_of(newest(other)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def stop_after(step):
    def watch(report):
        if report.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return watch


def batch_for(tuning, *, drawn=False, changed=None):
    """A batch of two random examples of 2 × 3 tokens."""
    draw = torch.Generator().manual_seed(3)
    config = tuning.transformer.config
    target, reference = torch.randn(2, 2, 6, config["in_channels"], generator=draw)
    width = config["connector_in_channels"]
    return FeatureBatch(
        ("a.png", "b.png"),
        target,
        None if drawn else reference,
        (2, 3),
        torch.randn(2, 9, width, generator=draw),
        torch.arange(9) < torch.tensor([[9], [5]]),
        changed,
    )


@pytest.fixture
def tuning(tiny_model, tmp_path):
    return Tuning(run_of(tmp_path / "run", tiny_model))


# ---- the objective


def test_the_loss_is_the_released_formula(tuning):
    batch = batch_for(tuning)
    seen = {}

    def look(_, __, inputs, output):
        seen.update(inputs, velocity=output[0])

    tuning.transformer.register_forward_hook(look, with_kwargs=True)
    loss = tuning.loss_of(batch, 7).item()
    # Once more, by hand.
    generators = [example_generator(0, 7, place) for place in range(2)]
    clean = batch.target.numpy().astype(np.float64)
    noise = np.stack([torch.randn(clean.shape[1:], generator=g).numpy() for g in generators])
    drawn = np.stack([torch.randn(1, generator=g).item() for g in generators])
    sigma = 1 / (1 + np.exp(-drawn))
    sigma = 3.1582 * sigma / (1 + 2.1582 * sigma)
    noisy = (1 - sigma)[:, None, None] * clean + sigma[:, None, None] * noise
    velocity = seen["velocity"].detach().numpy()[:, :6]
    assert loss == pytest.approx(np.square(velocity - (noise - clean)).mean(), rel=1e-5)
    np.testing.assert_allclose(seen["timestep"], sigma, rtol=1e-5)
    np.testing.assert_allclose(seen["hidden_states"][:, :6], noisy, rtol=1e-4, atol=1e-5)
    assert torch.equal(seen["hidden_states"][:, 6:], batch.reference)


@pytest.mark.parametrize(("version", "offset"), [("v1.0", 0), ("v1.1", 1)])
def test_each_release_gets_its_own_positions_and_a_time_up_to_one(tmp_path, version, offset):
    model = write_tiny_official(tmp_path / "model", version=version)
    tuning = Tuning(run_of(tmp_path / "run", model))
    assert tuning.transformer.version == version
    seen = {}
    tuning.transformer.register_forward_pre_hook(
        lambda _, __, inputs: seen.update(inputs), with_kwargs=True
    )
    tuning.loss_of(batch_for(tuning), 0)
    rows, columns = np.divmod(np.arange(6), 3)
    target = np.stack([np.zeros(6), rows, columns], 1)
    assert seen["img_ids"].tolist() == [*target.tolist(), *(target + offset).tolist()]
    assert not seen["txt_ids"].any()
    assert ((seen["timestep"] > 0) & (seen["timestep"] < 1)).all()


def test_the_shift_can_follow_the_resolution(tiny_model, tmp_path):
    tuning = Tuning(run_of(tmp_path / "run", tiny_model, time_shift="resolution"))
    # FLUX's rule at 6 tokens: exp(0.5 + (6 − 256) · 0.65 / 3840).
    assert tuning._shift(batch_for(tuning)) == pytest.approx((1.5804, 1.5804), abs=1e-4)


def test_changed_tokens_weigh_more_where_the_data_say_which(tiny_model, tmp_path):
    tuning = Tuning(run_of(tmp_path / "run", tiny_model, changed_weight=3.0))
    changed = torch.tensor([[1.0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    assert tuning._weights(batch_for(tuning, changed=changed)).tolist()[0] == [4, 4, 1, 1, 1, 1]
    assert tuning._weights(batch_for(tuning, drawn=True)) is None
    with pytest.raises(InvalidRequest, match=r"changed_weight 3: the data do not say.*a\.png"):
        tuning.loss_of(batch_for(tuning), 0)


def test_a_weight_that_the_data_cannot_follow_is_refused_before_anything_is_read(
    tiny_model, tmp_path
):
    config = run_of(tmp_path / "run", tiny_model, changed_weight=3.0)
    with pytest.raises(InvalidRequest, match=r"changed_weight 3: .*0\.target\.png has no mask"):
        train(config)
    assert not config.data.cache.exists()


# ---- the LoRA


def test_only_the_layers_that_are_named_are_adapted(tiny_model, tmp_path):
    tuning = Tuning(run_of(tmp_path / "run", tiny_model, layers=r"final_layer\.linear"))
    adapted = [n for n, m in tuning.transformer.named_modules() if hasattr(m, "lora_A")]
    assert adapted == ["proj_out"]


def test_it_covers_the_304_layers_of_the_released_trainer():
    with torch.device("meta"):
        transformer = Step1XEditTransformer2DModel(**RELEASED_TRANSFORMER)
    groups = lora._groups(transformer, load_default_pattern())
    assert len(groups) == 19 * 10 + 38 * 3 == 304
    assert sum(len(group) for group in groups) == 19 * (10 + 2 * 2) + 38 * (3 + 3)


def load_default_pattern():
    from step1x_edit.training.config import LORA_LAYERS

    return LORA_LAYERS


def test_it_begins_without_effect_and_as_the_released_one_is_drawn(tiny_model, tmp_path):
    plain = Editor.load(str(tiny_model)).pipeline.transformer
    tuning = Tuning(run_of(tmp_path / "run", tiny_model, rank=4))
    batch = batch_for(tuning)
    noisy, times = torch.randn(2, 6, batch.target.shape[-1]), torch.tensor([0.3, 0.8])
    trained = {n: p for n, p in tuning.transformer.named_parameters() if p.requires_grad}
    with torch.no_grad():
        begun = tuning._predict(batch, noisy, times)
        tuning.transformer.disable_adapters()
        assert torch.equal(begun, tuning._predict(batch, noisy, times))
    assert all("lora_" in name for name in trained)
    assert all(not p.any() for name, p in trained.items() if "lora_B" in name)
    downs = [p for name, p in trained.items() if "lora_A" in name]
    # kaiming_uniform(a = √5): uniform within 1 / √in.
    assert all(0.8 < p.abs().max() * p.shape[1] ** 0.5 <= 1 for p in downs)
    assert len(downs) == 10 + 2 * 3  # query, key and value share theirs
    assert len(dict(plain.named_parameters())) == len(
        [n for n, _ in tuning.transformer.named_parameters() if "lora_" not in n]
    )


def test_wrong_layers_are_refused(tiny_model, tmp_path):
    for pattern, message in (("connector_x", "fits no layer"), ("(", "no regular expression")):
        with pytest.raises(InvalidRequest, match=message):
            Tuning(run_of(tmp_path / "run", tiny_model, layers=pattern))


@pytest.mark.parametrize("layers", [r"(double|single)_blocks\..*", r"connector\..*"])
def test_all_three_layouts_give_the_picture_of_the_last_sample(tiny_model, tmp_path, layers):
    changes = {"layouts": ["kohya", "peft", "comfyui"], "layers": layers, "num_steps": 6}
    source = tmp_path / "pairs" / "0.source.png"
    chosen = {"num_steps": 3, "size_level_px": 64}
    sample = {"prompt": CAPTION, "image": str(source), **chosen}
    config = run_of(tmp_path / "run", tiny_model, samples=[sample], sample_every=4, **changes)
    config = config.model_copy(update={"save_dtype": "float32"})
    assert train(config) is None
    request = EditRequest(image=source, prompt=CAPTION, seed=0, **chosen)
    plain = np.asarray(Editor.load(str(tiny_model)).edit(request).images[0])
    for layout in config.layouts:
        path = config.folder / f"lora_{layout}.safetensors"
        editor = Editor.load(str(tiny_model), RuntimeConfig.checked(lora=[str(path)]))
        picture = np.asarray(editor.edit(request).images[0])
        sample = Image.open(config.folder / "samples" / "00_step_00000006.png")
        assert np.array_equal(picture, np.asarray(sample)), layout
        assert not np.array_equal(picture, plain)
    assert (config.folder / "samples" / "00_step_00000004.png").exists()
    assert "00_step_00000006.png" in (config.folder / "samples.html").read_text()
    header = read_header(config.folder / "lora_kohya.safetensors")
    assert {layer.rank for layer in header.layers.values()} == {2}
    assert header.metadata["modelspec.architecture"] == "step1x-edit-v1.1/lora"
    assert header.metadata["ss_network_dim"] == "2"
    card = (config.folder / "card.md").read_text()
    assert str(tiny_model) in card
    assert "lora_kohya.safetensors" in card
    assert (config.folder / "loss.svg").read_text().startswith("<svg")


def test_samples_without_memory_are_a_warning_and_other_faults_are_not(
    tiny_model, tmp_path, monkeypatch, caplog
):
    config = run_of(
        tmp_path / "run", tiny_model, num_steps=2, samples=[{"prompt": CAPTION}], sample_every=1
    )

    def fail(words):
        def after_step(*_):
            raise RuntimeError(words)

        return after_step

    monkeypatch.setattr(Samples, "after_step", fail("a fault"))
    with pytest.raises(RuntimeError, match="a fault"):
        train(config)
    monkeypatch.setattr(Samples, "after_step", fail("CUDA out of memory"))
    assert train(config) is None
    assert "after step 2: CUDA out of memory" in caplog.text
    assert (config.folder / "lora_kohya.safetensors").exists()


def test_a_run_does_not_go_on_over_other_weights(tiny_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    assert train(run_of(tmp_path / "run", model, num_steps=1)) is None
    # Stored in another way they are the same weights.
    assert train(run_of(tmp_path / "run", model, num_steps=2, weights="int8")) is None
    transformer = Step1XEditTransformer2DModel.from_pretrained(model / "transformer")
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.mul_(1.01)
    transformer.save_pretrained(model / "transformer")
    with pytest.raises(CheckpointError, match=r"run over other weights .*another folder"):
        train(run_of(tmp_path / "run", model, num_steps=3))


def test_samples_out_of_range_are_refused(tiny_model, tmp_path):
    for wrong in ({"num_steps": 0}, {"size_level_px": 8}):
        config = run_of(tmp_path / "run", tiny_model, samples=[{"prompt": CAPTION, **wrong}])
        with pytest.raises(InvalidRequest, match=next(iter(wrong))):
            Samples.requests(config)


# ---- never lose a step


def equality(tiny_model, tmp_path, half, **changes):
    whole = run_of(tmp_path / "whole", tiny_model, num_steps=2 * half, **changes)
    assert train(whole) is None
    parts = run_of(tmp_path / "parts", tiny_model, num_steps=2 * half, **changes)
    assert train(parts, watch=stop_after(half)) == signal.SIGTERM
    assert newest(parts.folder)["step"] == half
    assert train(parts) is None
    assert_same_bits(whole.folder, parts.folder)
    return whole


def test_twenty_and_twenty_steps_are_forty_to_the_bit(tiny_model, tmp_path):
    equality(
        tiny_model, tmp_path, 20, ema_decay=0.9, schedule="cosine", instruction_dropout=0.3
    )  # fmt: skip


@pytest.mark.slow
def test_two_hundred_and_two_hundred_steps_are_four_hundred_to_the_bit(tiny_model, tmp_path):
    equality(tiny_model, tmp_path, 200, ema_decay=0.99)


def test_samples_and_checkpointed_blocks_change_no_bit(tiny_model, tmp_path):
    plain = run_of(tmp_path / "plain", tiny_model, num_steps=4, gradient_checkpointing=False)
    train(plain)
    sample = {"prompt": CAPTION}
    watched = run_of(
        tmp_path / "watched", tiny_model, num_steps=4, samples=[sample], sample_every=1
    )
    train(watched)
    assert_same_bits(plain.folder, watched.folder)


def test_kept_steps_have_their_own_files(tiny_model, tmp_path):
    config = run_of(tmp_path / "run", tiny_model, num_steps=6, save_every=1, keep_every=2)
    train(config)
    kept = sorted(path.name for path in (config.folder / "kept").iterdir())
    assert kept == ["step_00000002", "step_00000004"]
    read_header(config.folder / "kept" / kept[0] / "lora_kohya.safetensors")


def test_a_loss_that_is_no_number_names_the_examples(tiny_model, tmp_path, monkeypatch):
    config = run_of(tmp_path / "run", tiny_model)
    nan = torch.tensor(float("nan"))
    monkeypatch.setattr(Tuning, "loss_of", lambda *_: nan)
    with pytest.raises(Step1XEditError, match=r"loss nan at step 0, .*\d\.target\.png"):
        train(config)


# ---- other kinds of run


@pytest.mark.parametrize("version", ["v1.0", "v1.1"])
def test_a_whole_model_trains_and_loads_in_both_layouts(tmp_path, version):
    model = write_tiny_official(tmp_path / "model", version=version)
    config = run_of(
        tmp_path / "run", model, kind="full", num_steps=3, rank=None, alpha=None, lr=1e-3
    )  # fmt: skip
    assert train(config) is None
    trained = newest(config.folder)["trained"]
    base = Step1XEditTransformer2DModel.from_official(model)
    names = {f"transformer.{name}" for name, _ in base.named_parameters()}
    assert set(trained) == names
    official = Step1XEditTransformer2DModel.from_official(
        config.folder / f"step1x-edit-{version}.safetensors"
    )
    editor = Editor.load(str(config.folder / "model"), RuntimeConfig.checked(dtype="bfloat16"))
    for name, parameter in editor.pipeline.transformer.named_parameters():
        assert torch.equal(parameter, trained[f"transformer.{name}"].bfloat16())
        assert torch.equal(parameter, official.get_parameter(name))
    connector = "connector.S.input_embedder.weight"
    assert not torch.equal(trained[f"transformer.{connector}"], base.get_parameter(connector))
    editor.edit(EditRequest(image=tmp_path / "pairs" / "0.source.png", prompt=CAPTION, seed=0))


@pytest.mark.parametrize("precision", ["fp8", "int4"])
def test_a_lora_trains_beside_stored_weights(tiny_model, tmp_path, precision):
    config = run_of(tmp_path / "run", tiny_model, num_steps=4, weights=precision, dtype="bfloat16")
    assert train(config) is None
    trained = newest(config.folder)["trained"]
    assert all(tensor.dtype == torch.float32 for tensor in trained.values())
    ups = [tensor for name, tensor in trained.items() if "lora_B" in name]
    assert all(up.any() for up in ups)


def test_few_bits_cannot_be_trained_as_a_whole(tiny_model, tmp_path):
    from step1x_edit.runtime.convert import convert

    convert(tiny_model, tmp_path / "small", "fp8")
    config = run_of(tmp_path / "run", tmp_path / "small", kind="full", rank=None, alpha=None)
    with pytest.raises(InvalidRequest, match=r"stores \d+ layers in few bits.*convert"):
        Tuning(config)


def test_an_optimiser_that_is_not_installed_is_refused_first(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(optimizers, "find_spec", lambda _: None)
    config = run_of(tmp_path / "run", tiny_model, optimizer="adamw8bit")
    with pytest.raises(MissingExtra, match=r"bitsandbytes.*step1x-edit\[train\]"):
        train(config)
    assert not config.folder.exists()


def test_the_optimiser_of_eight_bits_goes_on_to_the_bit(tiny_model, tmp_path):
    pytest.importorskip("bitsandbytes")
    # At this width only matrices of 4,096 numbers and more are stored in eight bits.
    whole = equality(tiny_model, tmp_path, 3, optimizer="adamw8bit", rank=64)
    states = newest(whole.folder)["optimizers"][0]["state"].values()
    assert torch.uint8 in {values["state1"].dtype for values in states}


def test_tensorboard_gets_the_lines_of_the_log(tiny_model, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = run_of(tmp_path / "run", tiny_model, num_steps=4, report_every=2, tensorboard=True)
    train(config)
    events = EventAccumulator(str(config.folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4]
