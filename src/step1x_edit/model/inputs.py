"""The arguments of a pipeline call, brought into one form: one of each per input."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from step1x_edit.errors import InvalidRequest


@dataclass(frozen=True)
class Row:
    """One picture to make."""

    image: Image.Image | None
    prompt: str
    negative_prompt: str
    size: tuple[int, int]
    """Width and height in pixels."""
    noise: Float[Tensor, "1 tokens channels"]


def one_guidance(
    guidance_scale: float | None, true_cfg_scale: float | None, default: float
) -> float:
    """The guidance of a call: one setting under two names.

    Args:
        guidance_scale: Its name in the first export of the release.
        true_cfg_scale: Its name in the later one.
        default: Where neither is given.

    Raises:
        InvalidRequest: They are given and differ.
    """
    given = {scale for scale in (guidance_scale, true_cfg_scale) if scale is not None}
    if len(given) > 1:
        raise InvalidRequest(
            f"guidance_scale {guidance_scale} and true_cfg_scale {true_cfg_scale} are one setting: "
            "give one of them"
        )
    return given.pop() if given else default


def check_drawing(version: str) -> None:
    """Refuse to draw from text alone with a model that never learned it.

    Args:
        version: The model's release.

    Raises:
        InvalidRequest: It is the first one.
    """
    if version == "v1.0":
        raise InvalidRequest("a v1.0 model cannot draw from text alone: give a picture to edit")


def one_negative(
    negative_prompt: str | Sequence[str] | None, *, is_drawn: bool, own: str
) -> str | Sequence[str]:
    """The negative prompt of a call: what was given, or nothing for an edit.

    Args:
        negative_prompt: As given; None where nothing was.
        is_drawn: Whether there is no picture to edit.
        own: What the model leads away from when it draws.
    """
    if negative_prompt is not None:
        return negative_prompt
    return own if is_drawn else ""


def broadcast(
    image: Image.Image | Sequence[Image.Image] | None,
    prompt: str | Sequence[str] | None,
    negative_prompt: str | Sequence[str],
) -> tuple[list[Image.Image | None], list[str], list[str]]:
    """Pictures, prompts and negative prompts, one of each per input.

    Args:
        image: One for all, or one each; None for text to image.
        prompt: Likewise.
        negative_prompt: Likewise.

    Raises:
        InvalidRequest: There is no prompt, or the numbers do not fit.
    """
    if prompt is None:
        raise InvalidRequest("no prompt: say what to change, or what to draw")
    images: list[Image.Image | None]
    images = [image] if image is None or isinstance(image, Image.Image) else [*image]
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    negatives = [negative_prompt] if isinstance(negative_prompt, str) else list(negative_prompt)
    count = max(len(images), len(prompts))
    named = {"pictures": images, "prompts": prompts, "negative prompts": negatives}
    for name, values in named.items():
        if len(values) not in (1, count):
            raise InvalidRequest(
                f"{len(values)} {name} for a batch of {count}: give one, or {count}"
            )
    return (
        images * (count // len(images)),
        prompts * (count // len(prompts)),
        negatives * (count // len(negatives)),
    )
