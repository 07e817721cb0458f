"""Which parts a run over photographs has, read from YAML; without a file, the classical ones."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from step1x_edit.datagen.config import Settings
from step1x_edit.datagen.filters import Check, Limits, default_checks
from step1x_edit.datagen.photographs import classical
from step1x_edit.datagen.photographs.clone_stamp import CloneStamp
from step1x_edit.datagen.photographs.mllm import Chat, MllmCaptioner, MllmJudge, QwenChat
from step1x_edit.datagen.photographs.roles import Parts
from step1x_edit.datagen.vocabulary import OBJECTS
from step1x_edit.errors import InvalidRequest


class ModelSettings(Settings):
    """A model of a part."""

    model: str = Field(description="folder, or hub id (it is downloaded)")
    device: str = "cpu"


class DetectorSettings(ModelSettings):
    """OWLv2."""

    names: dict[str, str] = Field(
        default={name: entry.zh for name, entry in OBJECTS.items()},
        min_length=1,
        description="English → Chinese name of what to look for",
    )
    threshold: float = Field(default=0.3, ge=0, le=1)


class PainterSettings(ModelSettings):
    """A pipeline of diffusers."""

    num_steps: int = Field(default=28, gt=0)
    guidance: float = Field(default=30.0, ge=0)
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"


class ChatSettings(Settings):
    """A multimodal language model: a Qwen2.5-VL folder, or one behind a server."""

    model: str = Field(description="folder; with a url, the model's name on that server")
    url: str | None = Field(default=None, description="of an OpenAI-compatible API, with its /v1")
    api_key_file: Path | None = None
    device: str = "cpu"


class JudgeSettings(ChatSettings):
    """One that scores edits."""

    least_score: float = Field(default=Limits().judged, ge=0, le=10)


class PartsConfig(Settings):
    """The parts; one that is left out is classical, or is not there."""

    detector: DetectorSettings | None = None
    segmenter: ModelSettings | None = None
    inpainter: PainterSettings | None = Field(
        default=None, description="fills holes; the clone stamp without"
    )
    painter: PainterSettings | None = Field(
        default=None, description="paints new objects, backgrounds and words"
    )
    depth: ModelSettings | None = None
    depth_painter: PainterSettings | None = Field(
        default=None, description="paints colours and materials over the depth"
    )
    captioner: ChatSettings | None = None
    judge: JudgeSettings | None = None


class Label(Settings):
    """What the subject of a photograph is called."""

    en: str = Field(min_length=1)
    zh: str = Field(min_length=1)


def read_labels(path: Path) -> dict[str, tuple[str, str]]:
    """Read a JSON of file name → ``{"en": …, "zh": …}``.

    Raises:
        InvalidRequest: The file cannot be read, or is not of that form.
    """
    try:
        values = TypeAdapter(dict[str, Label]).validate_json(path.read_bytes())
    except OSError as error:
        raise InvalidRequest(f"{path}: {error.strerror or error}: check the path") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "labels"
        raise InvalidRequest(f"{path}: {where}: {first['msg']}") from error
    return {name: (label.en, label.zh) for name, label in values.items()}


def build_parts(config: PartsConfig) -> Parts:
    """Load the parts of a run.

    Raises:
        MissingExtra: A classical part's package is not there.
        CheckpointError: A model cannot be loaded.
        InvalidRequest: A key file cannot be read.
    """
    classical.load_cv2()
    parts = Parts(
        detector=classical.SaliencyDetector(),
        segmenter=classical.GrabCut(),
        inpainter=CloneStamp(),
        text_finder=classical.TextLines(),
        flow=classical.DenseFlow(),
        captioner=None if config.captioner is None else MllmCaptioner(_chat(config.captioner)),
    )
    return _with_networks(parts, config)


def build_checks(config: PartsConfig) -> list[Check]:
    """The filters' checks, with the judge where there is one. Raises as `build_parts` does."""
    if config.judge is None:
        return default_checks()
    judge = MllmJudge(_chat(config.judge))
    return default_checks(Limits(judged=config.judge.least_score), judge=judge)


def _with_networks(parts: Parts, config: PartsConfig) -> Parts:
    """The parts with those of `config` in the classical ones' places."""
    asked = config.model_dump(exclude={"captioner", "judge"}, exclude_none=True)
    if not asked:
        return parts
    from step1x_edit.datagen.photographs import neural, painting

    kinds: dict[str, Any] = {
        "detector": neural.OpenVocabularyDetector,
        "segmenter": neural.SamSegmenter,
        "inpainter": painting.FillPainter,
        "painter": painting.FillPainter,
        "depth": neural.DepthModel,
        "depth_painter": painting.FluxDepthPainter,
    }
    return replace(parts, **{name: kinds[name](**settings) for name, settings in asked.items()})


def _chat(settings: ChatSettings) -> Chat:
    if settings.url is None:
        return QwenChat(Path(settings.model), settings.device)
    from step1x_edit.datagen.photographs.endpoint import EndpointChat

    key = None
    if settings.api_key_file is not None:
        try:
            key = settings.api_key_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise InvalidRequest(f"api_key_file {settings.api_key_file}: {reason}") from error
    return EndpointChat(settings.url, settings.model, key)
