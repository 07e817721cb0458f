"""The call that the published models are documented with, on any model folder.

    python examples/call_pipeline.py MODEL examples/coffee.jpg "make it black and white" out.png

The result has the model's size; `Editor` puts it back into the picture at the picture's own.
"""

import sys

import torch
from PIL import Image

from step1x_edit import Step1XEditPipeline

model, picture, instruction, out = sys.argv[1:]
pipeline = Step1XEditPipeline.from_pretrained(model)
edited = pipeline(
    image=Image.open(picture).convert("RGB"),
    prompt=instruction,
    num_inference_steps=8,
    guidance_scale=1.5,
    generator=torch.Generator().manual_seed(42),
)
edited.images[0].save(out)
