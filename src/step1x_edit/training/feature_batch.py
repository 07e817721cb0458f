"""What a training step of the released models reads: latents and instruction features.

Autoencoder and language model are frozen, so that their outputs are made once and kept; the trainer
never sees a picture. Datasets make these batches, `objective` and the trainer read them.
"""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class FeatureBatch:
    """Examples of one size.

    Attributes:
        names: What messages call each example of the whole batch: the path of its target, or its
            number.
        target: Tokens of the wanted pictures.
        reference: Tokens of the pictures to edit; None for text to image.
        grid: Rows and columns of the tokens, the same of target and reference.
        features: Last hidden states of the instruction, as the transformer takes them.
        mask: True where a feature is of a real token.
        changed: Share of each target token that the edit changes, where the dataset says it.
        first: Place of the first row in the whole batch, of which one process may have a part.
        share: Of the whole batch, that these rows are; 0 where they only stand in.
    """

    names: tuple[str, ...]
    target: Float[Tensor, "batch tokens channels"]
    reference: Float[Tensor, "batch tokens channels"] | None
    grid: tuple[int, int]
    features: Float[Tensor, "batch length width"]
    mask: Bool[Tensor, "batch length"]
    changed: Float[Tensor, "batch tokens"] | None = None
    first: int = 0
    share: float = 1.0
