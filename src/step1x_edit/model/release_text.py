"""Texts of the release that are fetched and not shipped: which they are, and this machine's copies.

The released models were trained with prose (a prompt prefix, the judge's prompts) that is not ours
to copy. `checkpoints.constants` gets it; here is how a copy is recognised, kept and read, so that a
pipeline finds its prefix without a network.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from platformdirs import user_cache_path


class ReleaseText(NamedTuple):
    """A constant of the official repository."""

    file: str
    """Path in that repository."""
    sha256: str
    """Of the constant's UTF-8 text."""


_JUDGE = "GEdit-Bench/viescore/vie_prompts.py"

RELEASE_TEXTS: dict[str, ReleaseText] = {
    "Qwen25VL_7b_PREFIX": ReleaseText(
        "modules/conditioner.py",
        "40882ddca94ca6971c8d5713d42464afa31dad09236dfacafe3ee26b4b44aa82",
    ),
    "_context_no_delimit": ReleaseText(
        _JUDGE, "446482c9035af15092f48235470d6daf29c9930e3f9faa2cd0f722363c74adde"
    ),
    "_prompts_0shot_two_image_edit_rule": ReleaseText(
        _JUDGE, "369c6b21479e6a853ffe85b11186c9d5ee3ef7388b8c9b5866a434bf113d0f8f"
    ),
    "_prompts_0shot_tie_rule_SC": ReleaseText(
        _JUDGE, "5b9aa479977bc3175329e9ee14d75b55773080e87e3e2181721985be30db6cc6"
    ),
    "_prompts_0shot_rule_PQ": ReleaseText(
        _JUDGE, "cd929b5619a3ad9311e3054b80afca75f8ee407be89345c324be0b0ca8b5c96b"
    ),
}
"""Name of the constant → where it is and how it is recognised."""


def is_genuine(name: str, text: str) -> bool:
    """Whether this is the release's own text, to the letter."""
    return hashlib.sha256(text.encode()).hexdigest() == RELEASE_TEXTS[name].sha256


def kept_text(name: str) -> str | None:
    """This machine's copy; None where there is none, or it is not the release's text.

    Args:
        name: Of `RELEASE_TEXTS`; None is given back for any other, too.
    """
    try:
        text = _place(name).read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return None
    return text if name in RELEASE_TEXTS and is_genuine(name, text) else None


def keep_text(name: str, text: str) -> Path:
    """Write this machine's copy into the user's cache folder, and say where."""
    place = _place(name)
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_suffix(".part")
    part.write_bytes(text.encode())
    part.replace(place)
    return place


def _place(name: str) -> Path:
    return user_cache_path("step1x-edit") / "constants" / f"{name}.txt"
