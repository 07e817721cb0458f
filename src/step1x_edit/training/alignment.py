"""What the picture tokens should know half-way through the transformer: the scene they show.

Representation alignment (REPA, Yu et al. 2024) pulls hidden features of a diffusion transformer
towards a vision model's, because learning *what* a picture shows from the velocity alone is slow.
Here the data engine knows what every token shows, so a linear head reads exact labels instead: the
reference tokens those of the scene before the edit, the noisy target tokens those after it, which
at high noise follow from the instruction alone. The head is thrown away after training.
"""

import threading
from collections.abc import Iterable
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, layer_norm

from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.backgrounds import NAMED
from step1x_edit.datagen.operators.style import FLAT, STYLES
from step1x_edit.datagen.operators.tone import ALL_TONES
from step1x_edit.datagen.records import Triplet
from step1x_edit.datagen.scene import Scene, owners
from step1x_edit.datagen.vocabulary import COLOURS, OBJECTS
from step1x_edit.model.latents import PIXELS_PER_TOKEN

UNKNOWN = -100
"""A label that is not scored."""


def numbered(names: Iterable[str]) -> dict[str | None, int]:
    """Names → labels; None is 0."""
    return {None: 0} | {name: number for number, name in enumerate(names, 1)}


OBJECT_LABELS = numbered(OBJECTS)
COLOUR_LABELS = numbered(COLOURS)
BACKGROUND_LABELS = numbered(NAMED)
TONE_LABELS = numbered((*ALL_TONES, *STYLES, FLAT))
NUM_CLASSES = (
    len(OBJECT_LABELS), len(COLOUR_LABELS), len(BACKGROUND_LABELS), len(TONE_LABELS), 2,
)  # fmt: skip
"""Of a token's object, its colour, the background, the tone or style over all, and whether the edit
changes it."""
LEAST_SHARE = 0.25
"""A token shows an object that owns this share of its pixels."""


def token_labels(
    triplet: Triplet, atlas: Atlas, *, target_only: bool = False
) -> Int[np.ndarray, "tokens 5"]:
    """The labels of a triplet's target tokens, then those of its reference tokens, row by row.

    What a photograph shows is unknown, all but the change.
    """
    changed = np.count_nonzero(squares(triplet.mask), -1) > 0
    edit = triplet.edit
    kinds = (edit.phrasing, edit.second.phrasing if edit.second else None)
    tone = max(TONE_LABELS.get(kind, 0) for kind in kinds)
    labels = [_scene_labels(edit.after, atlas, triplet.mask.shape, tone, changed)]
    if not target_only:
        labels.append(_scene_labels(edit.before, atlas, triplet.mask.shape, 0, changed))
    if triplet.photograph is not None:
        for part in labels:
            part[:, :3] = UNKNOWN
    return np.concatenate(labels)


def _scene_labels(
    scene: Scene, atlas: Atlas, size: tuple[int, ...], tone: int, changed: np.ndarray
) -> Int[np.ndarray, "tokens 5"]:
    owner = squares(owners(scene, atlas, (size[0], size[1])))  # (tokens, pixels)
    objects = np.zeros(len(owner), np.int64)
    colours = np.zeros(len(owner), np.int64)
    for index, placed in enumerate(scene.objects):
        shown = np.count_nonzero(owner == index, -1) >= LEAST_SHARE * owner.shape[1]
        objects[shown], colours[shown] = OBJECT_LABELS[placed.name], COLOUR_LABELS[placed.colour]
    behind = UNKNOWN if scene.background_name is None else BACKGROUND_LABELS[scene.background_name]
    labels = [objects, colours, np.full(len(owner), behind), np.full(len(owner), tone), changed]
    return np.stack(labels, -1)


def squares(picture: np.ndarray) -> np.ndarray:
    """Cut a picture into its tokens: (height, width) → (tokens, pixels of a token), row by row."""
    rows, columns = (side // PIXELS_PER_TOKEN for side in picture.shape)
    cut = picture.reshape(rows, PIXELS_PER_TOKEN, columns, PIXELS_PER_TOKEN)
    return cut.swapaxes(1, 2).reshape(rows * columns, -1)


MAX_SIDE = 16
"""Most rows or columns of tokens of a training picture."""
PLACE_WEIGHT = 0.5
CELLS = 4
"""Cells along a token's side."""
OUTLINE_WEIGHT = 1.0


def changed_cells(mask: Bool[np.ndarray, "height width"]) -> Float[np.ndarray, "tokens cells"]:
    """Changed share of each of a token's 4 × 4 cells, tokens and cells row by row."""
    side = PIXELS_PER_TOKEN // CELLS
    tokens = squares(mask).reshape(-1, CELLS, side, CELLS, side)
    return tokens.mean((2, 4), dtype=np.float32).reshape(len(tokens), -1)


CHANGED_WEIGHT = 3.0
"""Of the last label's losses: which object is meant is what is learnt last."""


class _Kept(threading.local):
    """Tokens of a forward pass, of each thread its own."""

    def __init__(self) -> None:
        self.tokens: dict[str, Tensor] = {}


class SceneHead(nn.Module):
    """Linear reading of the labels from the outputs of two transformer blocks.

    What is there is read first; whether it changes is read a block later, because that follows from
    what is there and what is asked for. Before both every token says where it stands: rotary
    positions tell a token how far others are, not its own place, and what a thing looks like at a
    place is learnt only once the place is known.

    Args:
        placed: The block after which a token's row and column are read.
        shown: The block after which the scene is read; a hook keeps its last picture tokens.
        meant: The block after which the change is read, likewise.
        dim: Width of the tokens.
    """

    def __init__(self, placed: nn.Module, shown: nn.Module, meant: nn.Module, dim: int) -> None:
        super().__init__()
        self.read = nn.Linear(dim, sum(NUM_CLASSES))
        self.locate = nn.Linear(dim, 2 * MAX_SIDE)
        self.outline = nn.Linear(dim, CELLS**2)
        self._kept = _Kept()
        for name, block in (("placed", placed), ("shown", shown), ("meant", meant)):
            block.register_forward_hook(partial(self._keep, name))

    def _keep(self, name: str, _: nn.Module, __: object, output: tuple[Tensor, Tensor]) -> None:
        self._kept.tokens[name] = output[1]

    def logits(self) -> list[Float[Tensor, "batch tokens classes"]]:
        """The five labels' logits after a forward pass of the transformer."""
        shown, meant = (
            self.read(layer_norm(tokens, tokens.shape[-1:])).float().split(NUM_CLASSES, -1)
            for tokens in (self._kept.tokens.pop("shown"), self._kept.tokens.pop("meant"))
        )
        return [*shown[:-1], meant[-1]]

    def loss(
        self,
        labels: Int[Tensor, "batch tokens 5"],
        cells: Float[Tensor, "batch target_tokens cells"],
        grid: tuple[int, int],
    ) -> Float[Tensor, ""]:
        """Mean cross-entropy of labels, outline and places after a forward pass.

        Args:
            labels: See `token_labels`.
            cells: Changed share of each cell of the target's tokens; see `changed_cells`.
            grid: Rows and columns of the target's tokens, and of the reference's.
        """
        outline = OUTLINE_WEIGHT * self._outline_loss(cells)
        return outline + self._scene_loss(labels) + PLACE_WEIGHT * self._place_loss(grid)

    def _outline_loss(self, cells: Float[Tensor, "batch target_tokens cells"]) -> Float[Tensor, ""]:
        """Tokens on the outline of the change and the others weigh the same in all."""
        tokens = self._kept.tokens["meant"][:, : cells.shape[1]]
        logits = self.outline(layer_norm(tokens, tokens.shape[-1:])).float()
        losses = binary_cross_entropy_with_logits(logits, cells, reduction="none").mean(-1)
        share = cells.mean(-1)
        crossed = (share > 0) & (share < 1)
        parts = [losses[where].mean() for where in (crossed, ~crossed) if bool(where.any())]
        return torch.stack(parts).mean()

    def _place_loss(self, grid: tuple[int, int]) -> Float[Tensor, ""]:
        tokens = self._kept.tokens.pop("placed")
        logits = self.locate(layer_norm(tokens, tokens.shape[-1:])).float()
        numbers = torch.arange(tokens.shape[1]) % (grid[0] * grid[1])
        places = (numbers // grid[1], numbers % grid[1])
        losses = [
            cross_entropy(part.flatten(0, 1), place.repeat(len(tokens)))
            for part, place in zip(logits.split(MAX_SIDE, -1), places, strict=True)
        ]
        return torch.stack(losses).mean()

    def _scene_loss(self, labels: Int[Tensor, "batch tokens 5"]) -> Float[Tensor, ""]:
        """Mean cross-entropy of the five labels.

        Tokens with label 0 (no object, no colour, unchanged …) and the others weigh the same in
        all, however few there are of either.
        """
        losses, weights = [], []
        for i, part in enumerate(self.logits()):
            for chosen in (labels[..., i] == 0, labels[..., i] > 0):
                if bool(chosen.any()):
                    losses.append(cross_entropy(part[chosen], labels[..., i][chosen]))
                    weights.append(CHANGED_WEIGHT if i == len(NUM_CLASSES) - 1 else 1.0)
        scale = torch.tensor(weights) / sum(weights)
        return (torch.stack(losses) * scale).sum()
