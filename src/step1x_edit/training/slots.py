"""What an instruction of the data engine says, as labels: which edit, of what, to what, where.

Read from the words that the engine put into the wording, so a slot that the chosen wording leaves
out has label 0, and so has one that the edit does not have. The letters of signs have no label.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from step1x_edit.datagen.backgrounds import NAMED
from step1x_edit.datagen.captions import KINDS
from step1x_edit.datagen.materials import MATERIALS
from step1x_edit.datagen.operators.addition import NUMBERS
from step1x_edit.datagen.operators.base import Clause, Edit
from step1x_edit.datagen.portraits import BEARDS, CLOTHES, GLASSES, HAIR, HAIR_COLOURS
from step1x_edit.datagen.vocabulary import COLOURS, OBJECTS, POSITIONS, plural

CHINESE_SLOTS = {"a_object": "object", "objects": "object", "to_where": "where"}
"""English slot → the Chinese one that says the same, where their names differ."""
SIZES = ("bigger", "biggest", "smaller", "smallest")
PARTS = {part.en: part.en for parts in (HAIR, BEARDS, GLASSES, CLOTHES) for part in parts.values()}
SEVERAL = {plural(name): name for name in OBJECTS}


@dataclass(frozen=True)
class Slot:
    """One thing that a sentence can say."""

    words: tuple[str, ...]
    """The engine's English slots that may say it; the first that does counts."""
    read: Callable[[str], int]
    """English words → label, 0 for none."""
    num_classes: int


def _one_of(meanings: dict[str, str]) -> tuple[Callable[[str], int], int]:
    """A reader of words → what they mean; of several that fit the longest counts."""
    labels = {meaning: number for number, meaning in enumerate(dict.fromkeys(meanings.values()), 1)}
    longest_first = "|".join(map(re.escape, sorted(meanings, key=len, reverse=True)))
    pattern = re.compile(rf"\b(?:{longest_first})\b")

    def read(words: str) -> int:
        found = pattern.search(words)
        return labels[meanings[found[0]]] if found else 0

    return read, len(labels) + 1


def _names(names: Iterable[str]) -> dict[str, str]:
    return {name: name for name in names}


def _places(words: str) -> int:
    """A bit for each position: several things may be added at once."""
    said = re.findall(r"\w+", words)
    return sum(1 << bit for bit, position in enumerate(POSITIONS) if position in said)


_objects = _one_of({**_names(OBJECTS), **SEVERAL})
_colours = _one_of(_names((*COLOURS, *HAIR_COLOURS)))
SLOTS = {
    "object": Slot(("object", "objects", "a_object"), *_objects),
    "new_object": Slot(("new_object",), *_objects),
    "colour": Slot(("colour", "a_object", "new_object", "objects"), *_colours),
    "described": Slot(("object",), *_one_of(_names((*COLOURS, *POSITIONS, *SIZES)))),
    "where": Slot(("where", "to_where"), _places, 1 << len(POSITIONS)),
    "count": Slot(("count",), *_one_of(_names(en for en, _ in NUMBERS.values()))),
    "background": Slot(("background",), *_one_of(_names(NAMED))),
    "material": Slot(("material",), *_one_of(_names(m.en for m in MATERIALS.values()))),
    "part": Slot(("hair", "beard", "glasses", "clothes"), *_one_of(PARTS)),
}
KIND_LABELS = {kind: number for number, kind in enumerate(KINDS, 1)}
_CLAUSE = (len(KIND_LABELS) + 1, *(slot.num_classes for slot in SLOTS.values()))
NUM_CLASSES = _CLAUSE * 2
"""Of the kind of edit and each of `SLOTS`, for the first clause and for the second."""


def labels_of(edit: Edit, sentence: str, language: str) -> list[int]:
    """The labels of an instruction, as many as `NUM_CLASSES`.

    Args:
        edit: What it asks for.
        sentence: The instruction.
        language: Its language, "en" or "zh".
    """
    first = _clause_labels(Clause(edit.phrasing, edit.words), sentence, language)
    if edit.second is None:
        return first + [0] * len(_CLAUSE)
    return first + _clause_labels(edit.second, sentence, language)


def _clause_labels(clause: Clause, sentence: str, language: str) -> list[int]:
    english, spoken = clause.words.get("en", {}), clause.words.get(language, {})

    def said(name: str) -> bool:
        key = CHINESE_SLOTS.get(name, name) if language == "zh" else name
        return name in english and key in spoken and spoken[key] in sentence

    def label(slot: Slot) -> int:
        read = (slot.read(english[name]) for name in slot.words if said(name))
        return next((number for number in read if number), 0)

    return [KIND_LABELS[clause.phrasing], *map(label, SLOTS.values())]
