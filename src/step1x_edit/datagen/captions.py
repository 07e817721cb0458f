"""Wordings of the instructions, in English and Chinese, with named slots.

The wordings are data, ``phrasings.json``: kind of edit → language → tier → list of sentences. The
*plain* ones say it shortly; the *varied* ones say it as people do; the *held-out* ones are for
evaluation alone.
"""

import json
from pathlib import Path
from typing import Literal

import numpy as np

Tier = Literal["plain", "all", "held_out"]
"""*all* is plain and varied together: what training reads."""

_TIERS: dict[str, dict[str, dict[str, list[str]]]] = json.loads(
    (Path(__file__).parent / "phrasings.json").read_text(encoding="utf-8")
)
KINDS = tuple(_TIERS)
"""Kinds of edit that have wordings."""
LANGUAGES = ("en", "zh")


def wordings(kind: str, language: str, tier: Tier = "all") -> list[str]:
    """The sentences of a kind of edit.

    Args:
        kind: One of `KINDS`.
        language: "en" or "zh".
        tier: Which of them.
    """
    tiers = _TIERS[kind][language]
    return tiers["plain"] + tiers["varied"] if tier == "all" else tiers[tier]


def phrase(
    rng: np.random.Generator, kind: str, words: dict[str, dict[str, str]], tier: Tier = "all"
) -> dict[str, str]:
    """One wording per language, its slots filled.

    Args:
        rng: Chooses the wording.
        kind: One of `KINDS`.
        words: Language → slot → word.
        tier: Which wordings to choose from.
    """
    return {
        language: str(rng.choice(wordings(kind, language, tier))).format(**words[language])
        for language in LANGUAGES
    }
