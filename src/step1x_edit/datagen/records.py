"""The record of the data engine: one edit triplet with everything that is known about it."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from step1x_edit.datagen.operators.base import Clause, Edit
from step1x_edit.datagen.scene import Scene, captions_of

LICENCES = {
    "objects": "MIT, Fluent Emoji, Microsoft",
    "flat": "MIT, Fluent Emoji, Microsoft",
    "panoramas": "CC0-1.0, Poly Haven",
    "photographs": "see assets/README.md",
    "portraits": "MIT, python_avatars; avataaars, Pablo Stanley, free to use",
    "fonts": "OFL-1.1, ZCOOL KuaiLe",
    "own": "the photograph's own",
}
"""Folder of the atlas → licence of what is in it; ``assets/README.md`` has the details."""
UNDESCRIBED = Scene(np.zeros((0, 0, 3), np.float32), None, ())
"""Before and after an edit of a photograph: a scene holds what was drawn, and that is nothing."""


@dataclass(frozen=True)
class Triplet:
    """Source, instruction, target."""

    category: str
    """Key of `operators.OPERATORS`."""
    source: UInt8[np.ndarray, "height width 3"]
    target: UInt8[np.ndarray, "height width 3"]
    mask: Bool[np.ndarray, "height width"]
    """Where source and target differ, to the pixel."""
    instructions: dict[str, str]
    """Language (en, zh) → the instruction."""
    captions: dict[str, str]
    """Language → what the target shows, for text to image; empty where it cannot be said."""
    edit: Edit
    """The scenes before and after, and the words of the instruction."""
    seed: int
    """The seed that makes this triplet again."""
    photograph: str | None = None
    """Name of the file that it was made from; None for a drawn scene."""

    @property
    def key(self) -> str:
        """Name of the record in a shard."""
        return f"{self.seed:013d}"

    @property
    def source_captions(self) -> dict[str, str]:
        """Language → what the source shows; empty where it cannot be said."""
        return captions_of(self.edit.before)

    def metadata(self) -> dict[str, Any]:
        """All but the pictures, as plain values."""
        art = self.edit.before.art() | self.edit.after.art()
        if self.photograph is not None:
            art |= {f"own/{self.photograph}"}
        return {
            "category": self.category,
            "instructions": self.instructions,
            "captions": self.captions,
            "source_captions": self.source_captions,
            "phrasing": self.edit.phrasing,
            "words": self.edit.words,
            "second": self.edit.second and asdict(self.edit.second),
            "unchanged": self.edit.unchanged,
            "before": self.edit.before.to_json(),
            "after": self.edit.after.to_json(),
            "seed": self.seed,
            "licences": {name: LICENCES[name.split("/")[0]] for name in sorted(art)},
            "photograph": self.photograph,
            "made_by": list(self.edit.made_by),
        }


def from_metadata(
    values: dict[str, Any],
    source: UInt8[np.ndarray, "height width 3"],
    target: UInt8[np.ndarray, "height width 3"],
    mask: Bool[np.ndarray, "height width"],
) -> Triplet:
    """The triplet again; its scenes have no pixels, its edit no finish.

    Raises:
        KeyError: A value is missing.
    """
    edit = Edit(
        Scene.from_json(values["before"]),
        Scene.from_json(values["after"]),
        values["phrasing"],
        values["words"],
        second=Clause(**second) if (second := values.get("second")) else None,
        unchanged=values.get("unchanged", False),
        made_by=tuple(values.get("made_by") or ()),
    )
    return Triplet(
        values["category"], source, target, mask, values["instructions"], values["captions"],
        edit, values["seed"], values.get("photograph"),
    )  # fmt: skip
