"""Build the parts of portraits: each avataaars part alone on nothing. Called by `atlas_build`."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from PIL import Image

from step1x_edit.datagen.portraits import BEARDS, CLOTHES, EXPRESSIONS, GLASSES, HAIR

WIDTH_PX = 264
FILLS = {"black": "#000000", "white": "#FFFFFF"}
SVG = "{http://www.w3.org/2000/svg}"
GROUPS = ("Body", "Clothing", "Mouth", "Nose", "Eyes", "Eyebrow", "Top")


def write_portraits(out: Path) -> None:
    """Write every layer that `portraits.draw_portrait` reads."""
    for name, parts, kept in _layers():
        _render(parts, kept).save(out / f"{name.replace(' ', '_')}.webp", lossless=True, method=6)


def _layers() -> Iterator[tuple[str, dict[str, Any], tuple[str, ...]]]:
    """Layer's name, arguments of ``Avatar``, and the groups of its drawing that stay."""
    import python_avatars as pa  # pyright: ignore[reportMissingImports] - of the assets extra

    for shade, fill in FILLS.items():
        yield f"body_{shade}", {"skin_color": fill}, ("Body",)
        for name, part in HAIR.items():
            if part.drawing:
                top = {"top": pa.HairType[part.drawing], "hair_color": fill}
                yield f"hair_{name}_{shade}", top, ("Top",)
        for name, part in BEARDS.items():
            if part.drawing:
                beard = {"facial_hair": pa.FacialHairType[part.drawing], "facial_hair_color": fill}
                yield f"beard_{name}_{shade}", beard, ("Top",)
        for name, part in CLOTHES.items():
            assert part.drawing is not None  # nobody is naked
            clothing = {"clothing": pa.ClothingType[part.drawing], "clothing_color": fill}
            yield f"clothes_{name}_{shade}", clothing, ("Clothing",)
    for name, part in GLASSES.items():
        if part.drawing:
            yield f"glasses_{name}", {"accessory": pa.AccessoryType[part.drawing]}, ("Top",)
    for name, (eyes, mouth, eyebrows) in EXPRESSIONS.items():
        face = {
            "eyes": pa.EyeType[eyes],
            "mouth": pa.MouthType[mouth],
            "eyebrows": pa.EyebrowType[eyebrows],
        }
        yield f"face_{name}", face, ("Mouth", "Nose", "Eyes", "Eyebrow")


def _render(parts: dict[str, Any], kept: tuple[str, ...]) -> Image.Image:
    import python_avatars as pa  # pyright: ignore[reportMissingImports] - of the assets extra

    bare = {"top": pa.HairType.NONE, "clothing": pa.ClothingType.NONE}
    avatar = pa.Avatar(style=pa.AvatarStyle.TRANSPARENT, **(bare | parts))
    tree = ElementTree.fromstring(avatar.render())
    for group in tree.iter(f"{SVG}g"):
        name = group.get("id", "").rsplit("_", 1)[-1]
        if name in GROUPS and name not in kept:
            group.clear()
    return draw_svg(ElementTree.tostring(tree, encoding="unicode"), WIDTH_PX)


def draw_svg(svg: str, width_px: int) -> Image.Image:
    """An SVG drawing as RGBA."""
    import resvg_py  # pyright: ignore[reportMissingImports] - of the assets extra

    png = resvg_py.svg_to_bytes(svg_string=svg, width=width_px)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")
