"""`step1x models pull`: say what will be fetched and how big it is, fetch it, check it."""

from collections.abc import Callable
from pathlib import Path

from step1x_edit.apps.columns import columns, megabytes
from step1x_edit.apps.console import working
from step1x_edit.checkpoints import constants, hub, resolve, store
from step1x_edit.checkpoints.catalog import CATALOG, DEFAULT_MODEL
from step1x_edit.errors import InvalidRequest
from step1x_edit.model.instruction_config import RELEASE_V1, read_instruction
from step1x_edit.model.release_text import RELEASE_TEXTS, keep_text
from step1x_edit.request import RuntimeConfig

CONSTANTS = "constants"
"""Stands for the release's own texts, where a model could be named."""

Say = Callable[[str], None]


def pull(model: str, source: str, official_source: Path | None, *, say: Say, quiet: bool) -> None:
    """Fetch a model, or check the one that is here, and with it the prompt prefix it needs.

    Args:
        model: A name of the catalogue, a hub repository, or `CONSTANTS`.
        source: Of `hub.SOURCES`.
        official_source: Checkout of the official repository to take the texts from.
        say: Prints a line.
        quiet: No bars.

    Raises:
        InvalidRequest: There is no such model, or no such hub.
        Step1XEditError: It cannot be fetched; what has come so far is kept.
        CheckpointError: What came is damaged.
    """
    if source not in hub.SOURCES:
        choices = ", ".join(hub.SOURCES)
        raise InvalidRequest(
            f"--from is {source!r}, the choices are {choices}: choose one of these"
        )
    if model == DEFAULT_MODEL:
        say(f"{model} ships with the package: nothing is to be fetched")
        return
    if model == CONSTANTS:
        for name in RELEASE_TEXTS:
            keep_text(name, constants.release_text(name, official_source=official_source))
        say(f"the release's {len(RELEASE_TEXTS)} texts are here and genuine")
        return
    _pull_files(model, "modelscope" if source == "modelscope" else "huggingface", say, quiet)
    files = resolve.find(model)
    instruction = RELEASE_V1 if files is None else read_instruction(files.folder)
    if instruction.prefix is None and instruction.prefix_constant is not None:
        name = instruction.prefix_constant
        keep_text(name, constants.release_text(name, official_source=official_source))
        say(f"the release's text {name} is here and genuine")


def ensure(model: str, runtime: RuntimeConfig, *, say: Say, quiet: bool) -> None:
    """Fetch a model that is not here.

    Raises:
        CheckpointError: That is forbidden, or what came is damaged.
        Step1XEditError: It cannot be fetched.
    """
    if resolve.find(model) is not None:
        return
    if runtime.offline:
        raise resolve.not_here(model)
    _pull_files(model, "huggingface", say, quiet)


def _pull_files(model: str, source: hub.Source, say: Say, quiet: bool) -> None:
    with working(f"asking {source}", quiet=quiet):
        plan = hub.plan(model, source)
    if not plan.items:
        say(f"{model} is in the Hugging Face cache already: nothing is to be fetched")
        return
    size, missing = megabytes(plan.num_bytes), megabytes(plan.missing_bytes)
    place = store.place_of(model).parent
    say(f"{model} from {source}: {len(plan.items)} files, {size}; {missing} to fetch into {place}")
    rows = [(item.remote.path, megabytes(item.remote.size), item.repository) for item in plan.items]
    for line in columns(rows):
        say(f"  {line}")
    with working("fetching", quiet=quiet, sizes=True) as bar:
        hub.fetch(plan, verify=True, on_bytes=bar, on_file=lambda path, what: say(f"{path} {what}"))
    say(f"{model} is complete and checked")


def describe(model: str) -> str:
    """What is known of a model that is not here."""
    location = CATALOG[model].location if model in CATALOG else model
    size = f", {CATALOG[model].size}" if model in CATALOG else ""
    return f"not here; `step1x models pull {model}` fetches it from {location}{size}"
