"""Command-line options made from the settings' own definitions in `request`.

A setting's help, limits and default stand there once; here it only gets a flag. Values go to
pydantic as they were typed, so that every wrong one is refused in the same words.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from functools import wraps
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from step1x_edit.errors import InvalidRequest
from step1x_edit.request import LIMIT, EditRequest, RuntimeConfig

SAMPLING_FLAGS = {
    "seed": "--seed",
    "num_steps": "--steps",
    "guidance": "--guidance",
    "negative_prompt": "--negative",
}
PICTURE_FLAGS = SAMPLING_FLAGS | {
    "size_level_px": "--size-level",
    "keep": "--keep",
    "max_pixels": "--max-pixels",
}
EDIT_FLAGS = PICTURE_FLAGS | {"mask": "--mask", "num_images": "--num-images"}
DRAW_FLAGS = SAMPLING_FLAGS | {
    "width": "--width",
    "height": "--height",
    "num_images": "--num-images",
}
RUNTIME_FLAGS = {
    "dtype": "--dtype",
    "device": "--device",
    "threads": "--threads",
    "weights": "--weights",
    "offload": "--offload",
    "lora": "--lora",
    "offline": "--offline",
    "official_source": "--official-source",
}

_METAVARS = {int: "INTEGER", float: "NUMBER", str: "TEXT"}
_Checked = TypeVar("_Checked", EditRequest, RuntimeConfig)


def with_settings(
    flags: Mapping[str, str],
    *,
    defaults: Mapping[str, Any] | None = None,
    runtime_flags: Mapping[str, str] = RUNTIME_FLAGS,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the options of a request and of the runtime.

    The command is called with ``settings`` (the request's fields as typed, None where nothing was)
    and ``runtime`` (the `RuntimeConfig`).

    Args:
        flags: Fields of `EditRequest` → the flags that set them.
        defaults: Fields for which this command has a default of its own.
        runtime_flags: Fields of `RuntimeConfig` → their flags.
    """
    defaults = defaults or {}

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def called(**values: Any) -> Any:
            settings = {field: values.pop(field) for field in flags}
            runtime = {field: values.pop(field) for field in runtime_flags}
            return command(**values, settings=settings, runtime=build(RuntimeConfig, runtime))

        own = [
            parameter
            for parameter in inspect.signature(command).parameters.values()
            if parameter.name not in ("settings", "runtime")
        ]
        made = [
            *(_option(EditRequest, field, flag, defaults) for field, flag in flags.items()),
            *(_option(RuntimeConfig, field, flag, {}) for field, flag in runtime_flags.items()),
        ]
        called.__signature__ = inspect.Signature([*own, *made])  # pyright: ignore[reportAttributeAccessIssue] - what inspect reads first
        called.__annotations__ = {p.name: p.annotation for p in (*own, *made)}
        return called

    return decorate


def build(model: type[_Checked], settings: Mapping[str, Any]) -> _Checked:
    """A request or a runtime from what was typed; what is None counts as not given.

    Raises:
        InvalidRequest: A value is wrong; the message names its flag.
    """
    given = {field: value for field, value in settings.items() if value is not None}
    if str(given.get("max_pixels")) == "0":  # how a command line says "no limit"
        given["max_pixels"] = None
    try:
        return model.checked(**given)
    except InvalidRequest as error:
        message = str(error)
        for field, flag in (EDIT_FLAGS | DRAW_FLAGS | RUNTIME_FLAGS).items():
            message = re.sub(rf"(^|; ){field}\b", rf"\g<1>{flag}", message)
        raise InvalidRequest(message) from error


def with_flags(message: str) -> str:
    """A message of a lower layer, with the flags where it names settings.

    Names of one word may as well be words of a sentence or parts of a file's name, and stay.
    """
    for field, flag in (EDIT_FLAGS | DRAW_FLAGS).items():
        if "_" in field:
            message = re.sub(rf"(?<![.\w]){field}\b", flag, message)
    return message


def _option(
    model: type[BaseModel], field: str, flag: str, defaults: Mapping[str, Any]
) -> inspect.Parameter:
    info = model.model_fields[field]
    default = defaults.get(field, info.default)
    if info.annotation is bool:
        switch = Annotated[bool, typer.Option(flag, help=info.description)]
        return inspect.Parameter(
            field, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=switch
        )
    repeats = get_origin(info.annotation) is tuple
    option = typer.Option(
        flag,
        help=f"{info.description}{_limits(info)}",
        metavar=_metavar(info.annotation),
    )
    return inspect.Parameter(
        field,
        inspect.Parameter.KEYWORD_ONLY,
        default=None if default in (None, "", ()) else str(default),
        annotation=Annotated[(list[str] if repeats else str) | None, option],
    )


def _limits(info: FieldInfo) -> str:
    """The numbers that pydantic checks, for the help."""
    words = {"ge": "from", "le": "to", "multiple_of": "in steps of"}
    if isinstance(info.json_schema_extra, dict) and LIMIT in info.json_schema_extra:
        return ""  # the description says it
    parts = [
        f"{word} {getattr(limit, name):g}"
        for name, word in words.items()
        for limit in info.metadata
        if hasattr(limit, name)
    ]
    return f" [{' '.join(parts)}]" if parts else ""


def _metavar(annotation: Any) -> str:
    kinds = [kind for kind in get_args(annotation) or (annotation,) if kind is not NoneType]
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    return _METAVARS.get(kinds[0], "FILE")
