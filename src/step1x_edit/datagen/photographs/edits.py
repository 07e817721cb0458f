"""What is done to a photograph, one function per edit category.

The categories are those of `operators`; the pairs are as good as the parts that make them (`roles`)
and so go through the filters. Called by `run`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from jaxtyping import Float
from PIL import Image
from scipy import ndimage

from step1x_edit.datagen.atlas import Atlas
from step1x_edit.datagen.backgrounds import NAMED, Picture, Pixels, named
from step1x_edit.datagen.materials import MATERIALS, made_of
from step1x_edit.datagen.operators.style import STYLES
from step1x_edit.datagen.operators.text import CHINESE, LATIN
from step1x_edit.datagen.operators.tone import TONES
from step1x_edit.datagen.photographs.cutout import check_cut_out, check_gone, check_steady
from step1x_edit.datagen.photographs.masks import bounds, grown, shrunk
from step1x_edit.datagen.photographs.roles import Found, Mask, Parts, Unsuitable
from step1x_edit.datagen.records import UNDESCRIBED
from step1x_edit.datagen.scene import PlacedObject, Scene, article, tint
from step1x_edit.datagen.vocabulary import COLOURS, OBJECTS, POSITIONS, where

HOLE_MARGINS = (0.03, 0.06, 0.1)
"""By which a cut-out is grown before it is filled, of the shorter side: its soft rim goes too, and
what was forgotten of it. The first one that the inpainter takes is used."""
FEATHER = 0.004
"""Softness of a cut-out's rim, of the shorter side."""
GROWTH = 1.4
SHRINKAGE = 0.65
LEAST_RECOLOURED = 0.35
"""Difference in one channel between the subject's mean colour and the one asked for."""
LEAST_TEXT_PX = 8
"""Height of a line of text that is worth an edit."""
FORMULA = "formula"
ATLAS = "atlas"

Words = dict[str, dict[str, str]]
Sprite = Float[np.ndarray, "h w 4"]


@dataclass(frozen=True)
class Shot:
    """A photograph of the wanted size, and what there is to edit it with."""

    picture: Picture
    parts: Parts
    atlas: Atlas
    rng: np.random.Generator
    seed: int
    """For the parts that draw at random."""
    label: tuple[str, str] | None = None
    """What the subject is called in English and Chinese, where a person has said it."""

    @property
    def pixels(self) -> Pixels:
        """The photograph in [0, 1]."""
        return self.picture.astype(np.float32) / 255

    @cached_property
    def found(self) -> Found:
        """The surest thing; `Unsuitable` is raised where there is none."""
        if self._thing.en is None and self.label is not None:
            return replace(self._thing, en=self.label[0], zh=self.label[1])
        return self._thing

    @cached_property
    def subject(self) -> Mask:
        """The pixels of `found`; `Unsuitable` is raised where they are not one whole thing."""
        mask = self.parts.segmenter.cut(self.picture, self._thing.box)
        check_cut_out(self.picture, mask)
        if self._thing.en is None:  # what only stands out may be a part of what it is called
            check_steady(self.picture, mask, self._cut)
        return mask

    @cached_property
    def _thing(self) -> Found:
        """As the detector calls it, if it can."""
        return self._surest(self.picture)

    def _surest(self, picture: Picture) -> Found:
        things = self.parts.detector.find(picture)
        if not things:
            raise Unsuitable("no subject that stands out")
        return things[0]

    def _cut(self, picture: Picture) -> Mask:
        return self.parts.segmenter.cut(picture, self._surest(picture).box)

    @property
    def cutters(self) -> tuple[str, ...]:
        """The names of the parts behind `subject`."""
        return self.parts.detector.name, self.parts.segmenter.name

    def about(self, en: Mapping[str, str] = {}, zh: Mapping[str, str] = {}) -> Words:
        """The words of an instruction about the subject; `Unsuitable` where it has no name."""
        found = self.found
        if found.en is None or found.zh is None:
            raise Unsuitable("subject has no name")
        return {"en": {"object": found.en, **en}, "zh": {"object": found.zh, **zh}}

    @cached_property
    def opacity(self) -> Float[np.ndarray, "height width 1"]:
        """The cut-out with a soft rim."""
        sigma = max(0.6, FEATHER * min(self.picture.shape[:2]))
        firm = shrunk(self.subject, 1).astype(np.float32)
        return ndimage.gaussian_filter(firm, sigma)[..., None]

    @property
    def sprite(self) -> Sprite:
        """The cut-out as a drawing, no larger than it is."""
        top, left, bottom, right = bounds(self.subject)
        return np.concatenate([self.pixels, self.opacity], -1)[top:bottom, left:right]

    def behind(self) -> Pixels:
        """The photograph without its subject; `Unsuitable` is raised where it still shows."""
        refusal = Unsuitable("nothing to fill the hole with")
        for margin in HOLE_MARGINS:
            hole = grown(self.subject, max(2, round(margin * min(self.picture.shape[:2]))))
            try:
                filled = self.parts.inpainter.fill(self.picture, hole)
                check_gone(self.parts.detector, filled, self.found.box)
            except Unsuitable as reason:
                refusal = reason
            else:
                return filled.astype(np.float32) / 255
        raise refusal


@dataclass(frozen=True)
class Draft:
    """What an edit makes of a photograph."""

    target: Pixels
    phrasing: str
    """One of `captions.KINDS`."""
    words: Words
    made_by: tuple[str, ...]
    source: Pixels | None = None
    """None is the photograph itself."""
    after: Scene = field(default=UNDESCRIBED)
    """What was drawn into it."""


def tone(shot: Shot) -> Draft:
    """A formula over the whole photograph."""
    name = str(shot.rng.choice(list(TONES)))
    return Draft(TONES[name](shot.pixels), name, {"en": {}, "zh": {}}, (FORMULA,))


def style(shot: Shot) -> Draft:
    """The photograph as a drawing, by a formula."""
    name = str(shot.rng.choice(list(STYLES)))
    return Draft(STYLES[name](shot.pixels), name, {"en": {}, "zh": {}}, (FORMULA,))


def removal(shot: Shot) -> Draft:
    """The subject goes."""
    words = shot.about()
    return Draft(shot.behind(), "removal", words, (*shot.cutters, shot.parts.inpainter.name))


def addition(shot: Shot) -> Draft:
    """The removal backwards: the photograph itself is the target."""
    words = shot.about()
    _, left, _, right = bounds(shot.subject)
    position = nearest_position((left + right) / 2 / shot.picture.shape[1])
    noun, zh = words["en"]["object"], words["zh"]["object"]
    words = {
        "en": {"a_object": f"{article(noun)} {noun}", "where": where(position)},
        "zh": {"object": zh, "where": POSITIONS[position][0]},
    }
    made_by = (*shot.cutters, shot.parts.inpainter.name)
    return Draft(shot.pixels, "addition", words, made_by, source=shot.behind())


def colour(shot: Shot) -> Draft:
    """The subject takes another colour."""
    shot.about()
    now = shot.pixels[shot.subject].mean(0)
    others = [n for n, c in COLOURS.items() if np.abs(now - c.rgb).max() > LEAST_RECOLOURED]
    name = str(shot.rng.choice(others))
    words = shot.about({"colour": name}, {"colour": COLOURS[name].zh})
    noun = words["en"]["object"]
    target, made_by = _repainted(
        shot, f"a {name} {noun}", lambda sprite: tint(sprite, COLOURS[name].rgb)
    )
    return Draft(target, "colour", words, made_by)


def material(shot: Shot) -> Draft:
    """The subject becomes one of another material."""
    name = str(shot.rng.choice([n for n, entry in MATERIALS.items() if entry.opacity is None]))
    en, zh = MATERIALS[name].en, MATERIALS[name].zh
    words = shot.about({"material": en}, {"material": zh})
    prompt = f"a {words['en']['object']} made of {en}"
    target, made_by = _repainted(shot, prompt, lambda sprite: made_of(sprite, name))
    return Draft(target, "material", words, made_by)


def background(shot: Shot) -> Draft:
    """What is behind the subject becomes something named."""
    name = str(shot.rng.choice(list(NAMED)))
    words = shot.about({"background": name}, {"background": NAMED[name].zh})
    painter = shot.parts.painter
    if painter is None:
        height, width = shot.picture.shape[:2]
        drawn = named(name, shot.atlas, width, height)
        target = drawn.pixels + shot.opacity * (shot.pixels - drawn.pixels)
        after = Scene(UNDESCRIBED.background, name, (), drawn.source)
        return Draft(target, "background", words, (*shot.cutters, ATLAS), after=after)
    painted = painter.paint(shot.picture, ~shot.subject, name, shot.seed)
    target = painted.astype(np.float32) / 255
    return Draft(target, "background", words, (*shot.cutters, painter.name))


def motion(shot: Shot) -> Draft:
    """The subject turns round, grows, shrinks, or goes elsewhere."""
    words = shot.about()
    top, left, bottom, right = bounds(shot.subject)
    height, width = shot.picture.shape[:2]
    if top == 0 or left == 0 or bottom == height or right == width:
        raise Unsuitable("subject cut off by the rim")
    kind = str(shot.rng.choice(["turn_round", "bigger", "smaller", "move"]))
    sprite, middle = shot.sprite, (left + right) / 2
    if kind == "turn_round":
        sprite = sprite[:, ::-1]
    elif kind in ("bigger", "smaller"):
        sprite = _scaled(sprite, GROWTH if kind == "bigger" else SHRINKAGE)
    else:
        now = nearest_position(middle / width)
        wanted = str(shot.rng.choice([name for name in POSITIONS if name != now]))
        middle = POSITIONS[wanted][1] * width
        en = {"where": where(wanted), "to_where": f"to the {wanted}"}
        words = shot.about(en, {"where": POSITIONS[wanted][0]})
    target = shot.behind()
    _paste(target, sprite, bottom - sprite.shape[0], round(middle - sprite.shape[1] / 2))
    return Draft(target, kind, words, (*shot.cutters, shot.parts.inpainter.name))


def replacement(shot: Shot) -> Draft:
    """Something else stands in the subject's place."""
    name = str(shot.rng.choice(list(OBJECTS)))
    new = f"{article(name)} {name}"
    words = shot.about({"new_object": new}, {"new_object": OBJECTS[name].zh})
    if words["en"]["object"] == name:
        raise Unsuitable("the new object is the old one")
    painter = shot.parts.painter
    if painter is None:
        return _replaced_by_drawing(shot, name, words)
    top, left, bottom, right = bounds(shot.subject)
    place = np.zeros_like(shot.subject)
    place[top:bottom, left:right] = True
    painted = painter.paint(shot.picture, place, new, shot.seed)
    target = painted.astype(np.float32) / 255
    return Draft(target, "replacement", words, (*shot.cutters, painter.name))


def text(shot: Shot) -> Draft:
    """A line of text goes, or, where there is a painter, becomes another one."""
    finder, painter = shot.parts.text_finder, shot.parts.painter
    if finder is None:
        raise Unsuitable("no part that finds text")
    lines = [
        line
        for line in finder.find(shot.picture)
        if line.box[2] - line.box[0] >= LEAST_TEXT_PX and len(line.text) > 2
    ]
    if not lines:
        raise Unsuitable("no text")
    line = lines[int(shot.rng.integers(len(lines)))]
    top, left, bottom, right = line.box
    hole = np.zeros(shot.picture.shape[:2], bool)
    hole[max(0, top - 1) : bottom + 1, max(0, left - 1) : right + 1] = True
    said = {"old_text": line.text}
    if painter is None or shot.rng.random() < 0.5:
        target = shot.parts.inpainter.fill(shot.picture, hole).astype(np.float32) / 255
        made_by = (finder.name, shot.parts.inpainter.name)
        return Draft(target, "text_removal", {"en": said, "zh": said}, made_by)
    new = str(shot.rng.choice(LATIN if line.text.isascii() else CHINESE))
    said["new_text"] = new
    painted = painter.paint(shot.picture, hole, f'the words "{new}"', shot.seed)
    target = painted.astype(np.float32) / 255
    return Draft(target, "text_change", {"en": said, "zh": said}, (finder.name, painter.name))


EDITS: dict[str, Callable[[Shot], Draft]] = {
    "removal": removal,
    "addition": addition,
    "replacement": replacement,
    "motion": motion,
    "text": text,
    "background": background,
    "colour": colour,
    "style": style,
    "tone": tone,
    "material": material,
}


def _repainted(
    shot: Shot, prompt: str, formula: Callable[[Sprite], Sprite]
) -> tuple[Pixels, tuple[str, ...]]:
    """The subject painted over its own depth, or by the formula where no part does that."""
    estimator, painter = shot.parts.depth, shot.parts.depth_painter
    target = shot.pixels
    if estimator is None or painter is None:
        top, left, _, _ = bounds(shot.subject)
        _paste(target, formula(shot.sprite), top, left)
        return target, (*shot.cutters, FORMULA)
    painted = painter.paint(estimator.depth(shot.picture), prompt, shot.seed)
    target += shot.opacity * (painted.astype(np.float32) / 255 - target)
    return target, (*shot.cutters, estimator.name, painter.name)


def _replaced_by_drawing(shot: Shot, name: str, words: Words) -> Draft:
    """A drawing of the atlas, as large as the subject was."""
    top, left, bottom, right = bounds(shot.subject)
    height, width = shot.picture.shape[:2]
    sprite = shot.atlas.sprite(name, round(np.sqrt((bottom - top) * (right - left))))
    rows, columns = sprite.shape[:2]
    row = int(np.clip(bottom - rows, 0, max(height - rows, 0)))
    column = int(np.clip((left + right - columns) // 2, 0, max(width - columns, 0)))
    target = shot.behind()
    _paste(target, sprite, row, column)
    x, y = (column + columns / 2) / width, (row + rows / 2) / height
    drawn = PlacedObject(name, x, y, max(rows, columns) / min(height, width))
    made_by = (*shot.cutters, shot.parts.inpainter.name, ATLAS)
    after = Scene(UNDESCRIBED.background, None, (drawn,))
    return Draft(target, "replacement", words, made_by, after=after)


def nearest_position(middle: float) -> str:
    """The key of `POSITIONS` that is nearest to a middle, a fraction of the picture's width."""
    return min(POSITIONS, key=lambda name: abs(POSITIONS[name][1] - middle))


def _scaled(sprite: Sprite, factor: float) -> Float[np.ndarray, "new_h new_w 4"]:
    rows, columns = (max(1, round(side * factor)) for side in sprite.shape[:2])
    planes = [
        Image.fromarray(np.ascontiguousarray(sprite[..., c])).resize(
            (columns, rows), Image.Resampling.BICUBIC
        )
        for c in range(4)
    ]
    return np.stack([np.asarray(plane) for plane in planes], -1).clip(0, 1)


def _paste(picture: Pixels, sprite: Sprite, top: int, left: int) -> None:
    """Lay a drawing over a picture; `Unsuitable` where it would not fit."""
    rows, columns = sprite.shape[:2]
    if top < 0 or left < 0 or top + rows > picture.shape[0] or left + columns > picture.shape[1]:
        raise Unsuitable("no room in the picture")
    view = picture[top : top + rows, left : left + columns]
    view += sprite[..., 3:] * (sprite[..., :3] - view)
