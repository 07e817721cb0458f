"""Get the release's own texts: from its repository, checked and kept, or from a checkout of it.

Prompt prefix and judge prompts are prose that is not ours to ship (`model.release_text` lists
them). Python source is only parsed here, never run. Called by `Editor.load`, by `step1x models pull
constants` and by the benchmark.
"""

import ast
from pathlib import Path

from step1x_edit.checkpoints.contents import one_line
from step1x_edit.checkpoints.download import read_url
from step1x_edit.errors import CheckpointError, Step1XEditError
from step1x_edit.model.instruction_config import InstructionConfig
from step1x_edit.model.release_text import RELEASE_TEXTS, is_genuine, keep_text, kept_text

# A branch, not a commit: what it may become is no danger, as only the text with the known SHA-256
# is taken.
SOURCE_URL = "https://raw.githubusercontent.com/stepfun-ai/Step1X-Edit/main"


def release_text(name: str, *, official_source: Path | None = None, offline: bool = False) -> str:
    """A text of the release, genuine to the letter.

    Args:
        name: Of `RELEASE_TEXTS`.
        official_source: Checkout of the official repository, read instead of anything else.
        offline: Do not fetch what is not here.

    Returns:
        The text; what was fetched is kept for the next time.

    Raises:
        CheckpointError: It is not to be had, or is another text; the message says what to do.
    """
    if name not in RELEASE_TEXTS:
        raise CheckpointError(f"{name!r} is no text of the release: {', '.join(RELEASE_TEXTS)} are")
    file = RELEASE_TEXTS[name].file
    if official_source is not None:
        place = official_source / file
        try:
            return _extract(name, place.read_bytes(), str(place))
        except OSError as error:
            raise CheckpointError(
                f"{place} cannot be read ({error.strerror}): --official-source must be a checkout "
                "of the official Step1X-Edit repository"
            ) from error
    kept = kept_text(name)
    if kept is not None:
        return kept
    advice = (
        "run `step1x models pull constants` where there is a network, or give --official-source "
        "DIR, a checkout of the official Step1X-Edit repository"
    )
    if offline:
        raise CheckpointError(f"the release's text {name!r} is not here, and --offline: {advice}")
    url = f"{SOURCE_URL}/{file}"
    try:
        content = read_url(url)
    except Step1XEditError as error:
        raise CheckpointError(
            f"the release's text {name!r} is not here ({one_line(error)}): {advice}"
        ) from error
    text = _extract(name, content, url)
    keep_text(name, text)
    return text


def with_prefix(
    config: InstructionConfig, *, official_source: Path | None = None, offline: bool = False
) -> InstructionConfig:
    """The configuration with its prefix, fetched if that is still to be done.

    Raises:
        CheckpointError: As `release_text`.
    """
    if config.prefix is not None or config.prefix_constant is None:
        return config
    return config.with_prefix(
        release_text(config.prefix_constant, official_source=official_source, offline=offline)
    )


def _extract(name: str, source: bytes, origin: str) -> str:
    """The value of a constant in Python source, which is not run."""
    try:
        assigned = [
            node.value
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Assign)
            and any(isinstance(left, ast.Name) and left.id == name for left in node.targets)
        ]
        value = ast.literal_eval(assigned[0]) if assigned else None
    except (SyntaxError, ValueError) as error:
        raise CheckpointError(
            f"{origin} holds no readable {name} ({one_line(error)}): give a whole file"
        ) from error
    if not isinstance(value, str):
        raise CheckpointError(f"{origin} holds no text {name}: give the release's own file")
    if not is_genuine(name, value):
        raise CheckpointError(
            f"{name} in {origin} is not the text of the release: its SHA-256 is not "
            f"{RELEASE_TEXTS[name].sha256}: give a checkout from before it was changed"
        )
    return value
