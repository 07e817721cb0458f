"""The mini's autoencoder with each downsampling as one convolution, for encoding batches on a CPU.

diffusers' `DCDownBlock2d` convolves, moves squares of 2 × 2 pixels into channels, and adds the
means of the moved input (Chen et al. 2024, "Deep compression autoencoder"). All of it is linear, so
one convolution of 4 × 4 pixels with stride 2 does the same without moving anything. Called by
`trainer`.
"""

import torch
from diffusers import AutoencoderDC
from diffusers.models.autoencoders.autoencoder_dc import DCDownBlock2d
from torch import nn

FACTOR = 2


def fold_downsampling(vae: AutoencoderDC) -> None:
    """Exchange the encoder's downsampling blocks for convolutions, in place.

    Results agree to rounding; the weights can no longer be saved under their names.
    """
    for parent in list(vae.encoder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, DCDownBlock2d) and child.downsample:
                setattr(parent, name, folded(child))


@torch.no_grad()
def folded(block: DCDownBlock2d) -> nn.Conv2d:
    """One convolution that computes what `block` does."""
    inner = block.conv
    outs, ins = inner.out_channels * FACTOR**2, inner.in_channels
    conv = nn.Conv2d(ins, outs, FACTOR + 2, stride=FACTOR, padding=1)
    conv.to(inner.weight.device, inner.weight.dtype).requires_grad_(False)
    assert conv.bias is not None
    assert inner.bias is not None  # as diffusers builds it
    conv.weight.zero_()
    conv.bias.copy_(inner.bias.repeat_interleave(FACTOR**2))
    for row in range(FACTOR):
        for column in range(FACTOR):
            place = row * FACTOR + column
            conv.weight[place :: FACTOR**2, :, row : row + 3, column : column + 3] = inner.weight
    if block.shortcut:
        for moved in range(ins * FACTOR**2):
            channel, place = divmod(moved, FACTOR**2)
            row, column = divmod(place, FACTOR)
            share = 1 / block.group_size
            conv.weight[moved // block.group_size, channel, 1 + row, 1 + column] += share
    return conv
