"""What an operator is, and what it makes."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.backgrounds import Pixels
from step1x_edit.datagen.scene import Scene, sample_scene
from step1x_edit.datagen.variety import Variety

Words = dict[str, dict[str, str]]
"""Language → slot → word."""


@dataclass(frozen=True)
class Clause:
    """One half of a compound instruction."""

    phrasing: str
    """One of `captions.KINDS`."""
    words: Words


@dataclass(frozen=True)
class Edit:
    """A scene before and after, and the words that go into the phrasing."""

    before: Scene
    after: Scene
    phrasing: str
    """One of `captions.KINDS`."""
    words: Words = field(default_factory=dict)
    finish: Callable[[Pixels], Pixels] | None = None
    """Applied to the target's pixels after rendering (tone and style)."""
    spoil: Callable[[Pixels], Pixels] | None = None
    """Applied to the source's pixels after rendering (restorations)."""
    second: Clause | None = None
    """What is asked for besides; `after` and `finish` have it."""
    made_by: tuple[str, ...] = ()
    """Parts and models that made the pixels, in order; a drawn scene needs none."""
    unchanged: bool = False
    """The instruction asks for what is so already, or for what cannot be."""

    @property
    def is_local(self) -> bool:
        """Whether source and target are renderings of scenes and nothing more."""
        return self.finish is None and self.spoil is None


@dataclass(frozen=True)
class Context:
    """What an operator draws from."""

    rng: np.random.Generator
    atlas: Atlas
    variety: Variety
    spared: frozenset[str] = frozenset()
    """Names of objects that an earlier edit has changed: a second one leaves them alone."""

    def happens(self, share: float) -> bool:
        """True with the probability `share`."""
        return self.rng.random() < share

    def pick(self, names: object) -> str:
        """One of some names."""
        return str(self.rng.choice(list(names)))  # pyright: ignore[reportArgumentType, reportCallIssue] - any iterable of names


SceneEdit = Callable[[Context, Scene], Edit | None]
"""Edits a given scene; None where the scene has nothing to edit."""
SceneSampler = Callable[[Context, int, int], Scene]
"""(context, width, height) → a scene."""


@dataclass(frozen=True)
class Operator:
    """One edit category.

    Attributes:
        first: (context, width, height) → an edit of a scene of its own, or None to draw again.
        second: Edits the scene that another edit has left; None where it cannot follow another.
    """

    first: Callable[[Context, int, int], Edit | None]
    second: SceneEdit | None = None


def some_scene(context: Context, width: int, height: int) -> Scene:
    """A scene of one to three objects, at times two of them alike."""
    twins = context.variety.referring
    return sample_scene(context.rng, context.atlas, width, height, twins=twins)


def on_scene(edit: SceneEdit, sample: SceneSampler = some_scene) -> Operator:
    """The operator of an edit that works on any scene."""

    def first(context: Context, width: int, height: int) -> Edit | None:
        return edit(context, sample(context, width, height))

    return Operator(first, edit)
