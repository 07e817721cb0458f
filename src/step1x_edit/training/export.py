"""From a training run to a model folder that everything else loads.

python -m step1x_edit.training.export configs/train/mini.yaml src/step1x_edit/assets/mini
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler

from step1x_edit.errors import InvalidRequest
from step1x_edit.model.pipeline import Step1XEditPipeline
from step1x_edit.training.config import EditRun, load
from step1x_edit.training.loop import TrainingRun
from step1x_edit.training.trainer import EditTraining

DEFAULTS = {
    "num_inference_steps": 2,
    "guidance_scale": -1.0,
    "size_level": 128,
    "time_shift": 10.0,
    "keep_threshold": 0.035,
}
"""What the mini does where a call names no setting: the best of a few that ``step1x bench mini``
measured. More steps draw sharper but surer of what is wrong; guidance gains nothing. The shift is
of the times that training drew most; of tokens that differ by less than the threshold next to none
was to change."""


def export(config: EditRun, out: Path, *, averaged: bool = True) -> Path:
    """Write a run's weights, finished or not, as a bfloat16 diffusers-layout folder.

    Args:
        config: The run; its folder holds checkpoints.
        out: The model folder.
        averaged: The average of the weights; False gives those of the last step.

    Raises:
        InvalidRequest: The run has no checkpoint yet.
    """
    training = EditTraining(config)
    run = TrainingRun(config.folder, training.trained, [], config.lr, config.num_steps)
    if not run.restore_weights():
        raise InvalidRequest(f"{config.folder} holds no checkpoint: train first")
    if averaged:
        run.load_ema_into(training.trained)
    pipeline = Step1XEditPipeline(
        processor=training.encoder.tokenizer.processor,
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
        text_encoder=training.encoder.text_encoder,
        transformer=training.transformer,
        vae=AutoencoderDC.from_pretrained(config.vae),  # the run's own may be in another form
        instruction=training.encoder.config,
        **DEFAULTS,
    )
    pipeline.to(torch.bfloat16)
    pipeline.save_pretrained(out)
    for file in out.glob("*/config.json"):  # where a network was read from says nothing elsewhere
        entries = json.loads(file.read_text(encoding="utf-8"))
        entries.pop("_name_or_path", None)
        file.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m step1x_edit.training.export")
    parser.add_argument("config", type=Path, help="the run's YAML")
    parser.add_argument("out", type=Path, help="model folder to write")
    parser.add_argument("--last", action="store_true", help="the last step's, not the average")
    arguments = parser.parse_args()
    settings = load(arguments.config)
    if not isinstance(settings, EditRun):
        parser.error(f"{arguments.config} is a run of kind {settings.kind}, not edit")
    export(settings, arguments.out, averaged=not arguments.last)
