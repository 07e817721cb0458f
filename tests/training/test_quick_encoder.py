"""What makes the rest of a training step quick changes nothing."""

import subprocess
import sys

import torch
from diffusers import AutoencoderDC

from step1x_edit.checkpoints.catalog import MINI_FOLDER
from step1x_edit.model.latents import encode_pictures
from step1x_edit.training.quick_encoder import fold_downsampling


@torch.no_grad()
def test_folded_downsampling_encodes_alike():
    torch.manual_seed(0)
    vae = AutoencoderDC.from_pretrained(MINI_FOLDER / "vae").eval()
    pictures = torch.rand(2, 3, 64, 96) * 2 - 1
    wanted = encode_pictures(vae, pictures)
    count = sum(1 for _ in vae.encoder.modules())
    fold_downsampling(vae)
    assert sum(1 for _ in vae.encoder.modules()) < count
    assert (encode_pictures(vae, pictures) - wanted).norm() <= 1e-5 * wanted.norm()


FAULTS = """
import resource
import torch
from step1x_edit.runtime.heap import keep_freed_memory
keep_freed_memory()
def faults(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        torch.ones(2**24)  # 64 MiB, more than glibc keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(10)
print(faults(10))
"""


def test_kept_memory_is_not_mapped_anew():
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 16384  # one block's pages; ten blocks' otherwise
