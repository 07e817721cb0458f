"""Wordings of the instructions, in English and Chinese: several per kind of edit, with named slots.

The wordings are data, ``phrasings.json``: kind of edit → language → list of sentences.
"""

import json
from pathlib import Path

import numpy as np

PHRASINGS: dict[str, dict[str, list[str]]] = json.loads(
    (Path(__file__).parent / "phrasings.json").read_text(encoding="utf-8")
)


def phrase(
    rng: np.random.Generator, phrasing: str, words: dict[str, dict[str, str]]
) -> dict[str, str]:
    """One wording per language, its slots filled.

    Args:
        rng: Chooses the wording.
        phrasing: Key of `PHRASINGS`.
        words: Language → slot → word.
    """
    return {
        language: str(rng.choice(wordings)).format(**words[language])
        for language, wordings in PHRASINGS[phrasing].items()
    }
