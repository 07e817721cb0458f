"""`step1x batch`: the official prompt JSON, one edit per picture, gone on with where it stopped.

An item is done when its result can be opened and says, in its own metadata, that it was made from
this picture by this model with these settings. A bad item is counted and named; the rest go on.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from step1x_edit import images
from step1x_edit.apps import checks, options
from step1x_edit.apps.console import explain, working
from step1x_edit.checkpoints.lora import applied, check_loras
from step1x_edit.checkpoints.resolve import ModelFiles, weights_hash
from step1x_edit.errors import InvalidRequest, Step1XEditError
from step1x_edit.request import EditRequest, RuntimeConfig, read_provenance

if TYPE_CHECKING:
    from step1x_edit.editor import Editor


class Item(NamedTuple):
    """One picture to edit."""

    request: EditRequest
    target: Path


@dataclass
class Batch:
    """What is to be done, and what has become of it."""

    pending: dict[str, Item]
    edited: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Name → why."""

    @classmethod
    def read(
        cls,
        prompts: Path,
        input_dir: Path,
        output_dir: Path,
        settings: Mapping[str, Any],
        *,
        overwrite: bool,
    ) -> "Batch":
        """Make the requests of a prompt file.

        Args:
            prompts: JSON of picture names, relative to `input_dir`, and instructions.
            input_dir: Folder of the pictures.
            output_dir: Folder of the results, which keep the names.
            settings: Fields of `EditRequest` for every item, as typed.
            overwrite: Results may replace pictures of `input_dir`.

        Raises:
            InvalidRequest: The file, a folder or a setting is wrong, and so nothing can be done.
        """
        instructions = read_prompts(prompts)
        every = {"image": input_dir, "prompt": "only to check the settings", **settings}
        options.build(EditRequest, every)
        if not input_dir.is_dir():
            raise InvalidRequest(f"input folder {input_dir} does not exist: give another")
        checks.check_folder(output_dir)
        made = cls({})
        sources = [input_dir / name for name in instructions]
        for name, instruction in instructions.items():
            target = output_dir / name
            try:
                request = options.build(
                    EditRequest, {"image": input_dir / name, "prompt": instruction, **settings}
                )
                target.parent.mkdir(parents=True, exist_ok=True)  # a name may hold folders
                checks.check_outputs(target, 1, sources, overwrite=overwrite)
            except (InvalidRequest, OSError) as error:
                made.failed[name] = explain(error)[0]
            else:
                made.pending[name] = Item(request, target)
        return made

    def look_for_done(self, model: str, runtime: RuntimeConfig, *, quiet: bool) -> None:
        """Check every picture, and take out of `pending` what is bad and what is done already.

        Raises:
            InvalidRequest: The model is unknown.
            CheckpointError: The files of the model or of a LoRA are not what they should be.
        """
        local = checks.check_model(model)
        check_loras(runtime.lora, local and local.components["transformer"])
        made_by = {
            "model_hash": None if local is None else weights_hash(local, runtime.weights),
            "lora": applied(runtime.lora),
        }
        total = len(self.pending)
        with working("checking", quiet=quiet, steps=True) as bar:
            for count, (name, item) in enumerate(tuple(self.pending.items()), 1):
                try:
                    picture = checks.check_pictures(item.request)
                    checks.check_size(picture, item.request, local)
                except (InvalidRequest, OSError) as error:
                    self._fail(name, error)
                else:
                    if picture is not None and _is_done(item, picture.sha256, made_by, local):
                        self.skipped.append(name)
                        del self.pending[name]
                bar(count, total)

    def run(self, editor: "Editor", *, quiet: bool) -> None:
        """Edit what is left to do."""
        total = len(self.pending)
        with working("editing", quiet=quiet, steps=True) as bar:
            for count, (name, item) in enumerate(tuple(self.pending.items()), 1):
                try:
                    editor.edit(item.request).save([item.target])
                except (Step1XEditError, OSError, RuntimeError) as error:
                    self._fail(name, error)
                else:
                    self.edited.append(name)
                    del self.pending[name]
                bar(count, total)

    def summary(self) -> str:
        """The counts, in one line."""
        return (
            f"{len(self.edited)} edited, {len(self.skipped)} skipped (done), "
            f"{len(self.failed)} failed"
        )

    def _fail(self, name: str, error: Exception) -> None:
        self.failed[name] = explain(error)[0]
        del self.pending[name]


def read_prompts(file: Path) -> dict[str, str]:
    """The official prompt JSON: ``{"picture name": "instruction"}``.

    Raises:
        InvalidRequest: It is missing, not JSON (line and column are named), empty, or holds
            something else; a name occurs twice or leads out of the folder.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=_unique)
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read ({error.strerror}): give another") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"{file} is not UTF-8 at byte {error.start}: save it as UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise InvalidRequest(f"{file} is not JSON at {place}: {error.msg}") from error
    if not isinstance(value, dict) or not value:
        raise InvalidRequest(
            f'{file} must be {{"picture name": "instruction", …}}, with one or more'
        )
    for name, instruction in value.items():
        if not isinstance(instruction, str):
            kind = type(instruction).__name__
            raise InvalidRequest(f"{file}: {name!r} has a {kind} for an instruction: give a text")
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or not name:
            raise InvalidRequest(f"{file}: {name!r} is no name inside the input folder: correct it")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InvalidRequest(f"the prompt JSON names {twice!r} twice: leave one of them out")
    return dict(pairs)


def _is_done(
    item: Item, source_sha256: str, made_by: Mapping[str, Any], local: ModelFiles | None
) -> bool:
    """Whether the target was made from this source by this model with these settings."""
    if local is None or not item.target.exists():
        return False
    found = read_provenance(item.target)
    if found is None:
        return False
    request, own = item.request, local.settings
    guidance = own.guidance_scale if request.guidance is None else request.guidance
    wanted = {
        **made_by,
        "source_sha256": source_sha256,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt or "",
        "seed": request.seed,
        "num_steps": request.num_steps or own.num_inference_steps,
        "guidance": guidance,
        "size_level_px": request.size_level_px or own.size_level,
        "keep": request.keep,
        "mask_sha256": None,
    }
    if any(getattr(found, name) != value for name, value in wanted.items()):
        return False
    try:
        images.open_picture(item.target)
    except InvalidRequest:
        return False
    return True
