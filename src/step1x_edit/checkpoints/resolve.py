"""From what `--model` says to the files of a model on this machine, told by their headers.

A model is a name of the catalogue, a hub repository, a diffusers-layout folder, a folder of
official single files, or an official transformer file with the rest of the release beside it.
Called by `Editor` and by the doors. Without torch, and without network: `hub` fetches what is not
here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any, Literal

from step1x_edit.checkpoints import store
from step1x_edit.checkpoints.catalog import (
    CATALOG,
    MINI_FOLDER,
    MLLM_NAME,
    MLLM_REPOSITORY,
    RELEASE,
    VAE_FILE,
    locate,
)
from step1x_edit.checkpoints.contents import (
    V1P2,
    WEIGHT_COMPONENTS,
    ModelSettings,
    family_of,
    fingerprint,
    is_official,
    not_runnable,
    read_config,
    read_index,
    read_names,
    read_settings,
    summarise,
    version_of,
    weight_files,
)
from step1x_edit.errors import CheckpointError

_OFFICIAL_CLASSES = {
    "processor": "Qwen2_5_VLProcessor",
    "text_encoder": "Qwen2_5_VLForConditionalGeneration",
    "transformer": "Step1XEditTransformer2DModel",
    "vae": "AutoencoderKL",
}


@dataclass(frozen=True)
class ModelFiles:
    """Where the parts of a model are.

    Attributes:
        place: The folder or file that was given or found.
        layout: How the transformer and the autoencoder are stored.
        components: Component → its folder, or its official file. It may be missing: see `check`.
        classes: Component → the name of its class.
        index: The ``model_index.json``; empty in the official layout.
    """

    place: Path
    layout: Literal["diffusers", "official"]
    components: Mapping[str, Path]
    classes: Mapping[str, str]
    index: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where ``instruction.json`` would be."""
        return self.place if self.place.is_dir() else self.place.parent

    @property
    def settings(self) -> ModelSettings:
        """What the model uses where a request names nothing."""
        return read_settings(dict(self.index))

    @property
    def version(self) -> str:
        """See `contents.version_of`."""
        return version_of(self.components["transformer"])

    def fingerprint(self) -> str:
        """See `contents.fingerprint`."""
        if self.layout == "diffusers":
            return fingerprint(self.place)
        return fingerprint(
            {name: weight_files(self.components[name]) for name in WEIGHT_COMPONENTS}
        )

    def check(self) -> None:
        """Look into the header of every weights file.

        Raises:
            CheckpointError: A part is missing or broken, or the release cannot be run.
        """
        if self.layout == "diffusers":
            for name, folder in self.components.items():
                if not folder.is_dir():
                    raise CheckpointError(f"{self.place} has no {name} folder: get the model again")
        if self.version == V1P2:
            raise CheckpointError(not_runnable(self.place))
        if self.layout == "official":
            self._check_company()
        for name in WEIGHT_COMPONENTS:
            part = self.components[name]
            if part.is_dir():
                read_config(part)
            summarise(part)

    def _check_company(self) -> None:
        """Refuse an official transformer file alone, and say how to get the rest."""
        transformer = self.components["transformer"]
        beside = transformer.parent
        here, below = quote(str(beside)), quote(str(beside / MLLM_NAME))
        wanted = {
            self.components["vae"]: f"hf download {RELEASE} {VAE_FILE} --local-dir {here}",
            self.components["text_encoder"]: f"hf download {MLLM_REPOSITORY} --local-dir {below}",
        }
        absent = {part.name: command for part, command in wanted.items() if not part.exists()}
        if absent:
            raise CheckpointError(
                f"{transformer.name} needs {' and '.join(absent)} beside it in {beside}: fetch "
                f"with `{'` and `'.join(absent.values())}`"
            )


def weights_hash(files: ModelFiles, weights: str) -> str:
    """Tells which weights a picture was made with: the fingerprint, and how they were stored.

    Args:
        files: The model.
        weights: Of the `RuntimeConfig`.
    """
    return files.fingerprint() + ("" if weights == "auto" else f"-{weights}")


def find(model: str) -> ModelFiles | None:
    """The files of a model; None where it is known, and has still to be fetched.

    Args:
        model: See above.

    Raises:
        InvalidRequest: No such model is known.
        CheckpointError: The path holds another family's model, or none, or several.
    """
    location = locate(model)
    if model in CATALOG and CATALOG[model].transformer_file:
        return _find_official(location, CATALOG[model].transformer_file)
    path = Path(location)
    if path.exists():
        return look(path)
    if path == MINI_FOLDER:
        raise CheckpointError(f"{path} is missing: install the package again")
    folder = store.folder_of(location)
    return None if folder is None else look(folder)


def not_here(model: str) -> CheckpointError:
    """What is said of a model that would have to be fetched, where that is forbidden."""
    return CheckpointError(
        f"the model {model!r} is not here, and --offline: run `step1x models pull {model}` where "
        "there is a network"
    )


def look(path: Path) -> ModelFiles:
    """What a path holds.

    Raises:
        CheckpointError: Another family's model, none, or several.
    """
    if path.is_file():
        return _official(path)
    if not (path / "model_index.json").exists():
        files = sorted(path.glob("*.safetensors"))
        models = [file for file in files if is_official(read_names(file))]
        if len(models) > 1:
            names = ", ".join(file.name for file in models)
            raise CheckpointError(f"{path} holds several models: give the path of one of {names}")
        if files:
            return _official((models or files)[0])
    index = read_index(path)
    kinds = {name: value[1] for name, value in sorted(index.items()) if isinstance(value, list)}
    return ModelFiles(path, "diffusers", {name: path / name for name in kinds}, kinds, index)


def _official(transformer: Path) -> ModelFiles:
    """An official transformer file and what should be beside it."""
    names = read_names(transformer)
    if not is_official(names):
        if any(name.startswith("connector.") for name in names):
            raise CheckpointError(
                f"{transformer} is one file of a diffusers-layout model: give the folder that "
                "holds model_index.json"
            )
        raise CheckpointError(
            f"{transformer} is {family_of(names)}: give the official transformer file"
        )
    beside = transformer.parent
    return _compose(transformer, beside / VAE_FILE, beside / MLLM_NAME)


def _find_official(repository: str, file: str) -> ModelFiles | None:
    """A model of the catalogue, its parts where each repository's files are kept."""
    transformer = store.file_of(repository, file)
    vae = store.file_of(RELEASE, VAE_FILE)
    mllm = store.folder_of(MLLM_REPOSITORY)
    if transformer is None or vae is None or mllm is None:
        return None
    return _compose(transformer, vae, mllm)


def _compose(transformer: Path, vae: Path, mllm: Path) -> ModelFiles:
    parts = {"processor": mllm, "text_encoder": mllm, "transformer": transformer, "vae": vae}
    return ModelFiles(transformer, "official", parts, _OFFICIAL_CLASSES)
