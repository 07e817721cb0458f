"""Training the mini: the quick form of its networks and the plain one are one run."""

import pytest
import torch
from PIL import Image

from step1x_edit import Editor, EditRequest
from step1x_edit.checkpoints.catalog import MINI_FOLDER
from step1x_edit.model.transformer import Step1XEditTransformer2DModel
from step1x_edit.training import trainer
from step1x_edit.training.config import EditRun
from step1x_edit.training.dataset import EditCollate, TripletBatches
from step1x_edit.training.export import export
from step1x_edit.training.trainer import EditTraining


def edit_run(folder, **settings):
    return EditRun.model_validate(
        {
            "kind": "edit",
            "folder": folder,
            "vae": MINI_FOLDER / "vae",
            "processor": MINI_FOLDER / "processor",
            "start": MINI_FOLDER,
            "num_steps": 1,
            "batch_size": 2,
            "lr": 1e-4,
            "text_to_image_share": 0.0,
            "data": {"sizes": {"64x64": 1.0}, "num_workers": 0},
            **settings,
        }
    )


def plainly(monkeypatch):
    monkeypatch.setattr(trainer, "can_quicken", lambda: False)


@pytest.mark.parametrize("text_to_image_share", [0.0, 1.0])
def test_the_loss_is_the_plain_form_s_to_rounding(tmp_path, monkeypatch, text_to_image_share):
    config = edit_run(tmp_path, text_to_image_share=text_to_image_share)
    quick = EditTraining(config)
    collate = EditCollate(quick.encoder.tokenizer, 0.0, 0.5, text_to_image_share)
    batch = next(iter(TripletBatches(config.data, 2, collate)))
    plainly(monkeypatch)
    plain = EditTraining(config)
    losses = []
    for training in (quick, plain):
        torch.manual_seed(0)
        losses.append(training.loss_of(batch)[0].item())
    assert plain.quick is None
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def test_a_run_of_the_plain_form_goes_on(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        plainly(patched)
        trainer.train(edit_run(tmp_path))
    steps = []
    trainer.train(edit_run(tmp_path, num_steps=2), watch=lambda report: steps.append(report.step))
    assert steps == [2]
    written = Step1XEditTransformer2DModel.from_pretrained(tmp_path / "model" / "transformer")
    shipped = Step1XEditTransformer2DModel.from_pretrained(MINI_FOLDER / "transformer")
    assert written.state_dict().keys() == shipped.state_dict().keys()


def test_a_run_becomes_a_model_that_edits(tmp_path):
    config = edit_run(tmp_path / "run")
    trainer.train(config)
    editor = Editor.load(str(export(config, tmp_path / "model")))
    configs = [path.read_text() for path in (tmp_path / "model").glob("*/config.json")]
    assert len(configs) == 3
    assert not any("_name_or_path" in config for config in configs)
    picture = Image.new("RGB", (64, 64), "red")
    result = editor.edit(EditRequest.checked(image=picture, prompt="make it blue", num_steps=1))
    assert result.images[0].size == (64, 64)


def test_two_and_two_steps_are_four_to_the_bit(tmp_path):
    """With noise that two threads draw."""
    settings = {"batch_size": 4, "parts": 2, "text_to_image_share": 0.3}
    for name, all_steps in (("whole", [4]), ("parts", [2, 4])):
        for num_steps in all_steps:
            trainer.train(
                edit_run(tmp_path / name, num_steps=num_steps, decay_share=0.0, **settings)
            )
    whole, parts = (
        torch.load(tmp_path / name / "checkpoints" / "step_00000004.pt") for name in
        ("whole", "parts")
    )  # fmt: skip
    for part in ("trained", "ema"):
        assert whole[part].keys() == parts[part].keys()
        assert all(torch.equal(whole[part][name], parts[part][name]) for name in whole[part])
