"""Build the atlas of named objects and panoramas from the packages that hold the art.

Run once by whoever changes the atlas; the result is kept in ``assets/atlas`` and read by
`atlas.Atlas`:

    npm pack @lobehub/fluent-emoji-3d@1.1.0 @iconify-json/fluent-emoji-flat@1.2.6 \
      @pmndrs/assets@1.7.0 @fontsource/zcool-kuaile@5.3.0
    # unpack each beside the other
    pip install step1x-edit[assets]
    python -m step1x_edit.datagen.atlas_build UNPACKED_DIR

The art's licences are in ``assets/README.md``.
"""

import argparse
import base64
import json
import re
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from step1x_edit.datagen.atlas import ATLAS_DIR, PANORAMAS
from step1x_edit.datagen.atlas_portraits import draw_svg, write_portraits
from step1x_edit.datagen.vocabulary import OBJECTS

SPRITE_PX = 128
PHOTOGRAPH_PX = 384
PHOTOGRAPHS = (
    "astronaut",
    "chelsea",
    "brick",
    "grass",
    "gravel",
    "colorwheel",
    "immunohistochemistry",
)


def build(packages: Path, out: Path = ATLAS_DIR) -> None:
    """Write sprites, flat ones too, panoramas, photographs, fonts and portraits under `out`.

    Args:
        packages: Folder that holds the unpacked npm packages, each with its ``package`` folder.
        out: The atlas folder.
    """
    for kind in ("objects", "flat", "panoramas", "photographs", "fonts", "portraits"):
        (out / kind).mkdir(parents=True, exist_ok=True)
    sprites = next(packages.glob("lobehub-fluent-emoji-3d-*/package/assets"))
    for name, entry in OBJECTS.items():
        sprite = Image.open(sprites / f"{entry.code_point}.webp").convert("RGBA")
        sprite = sprite.crop(sprite.getchannel("A").getbbox())
        sprite.thumbnail((SPRITE_PX, SPRITE_PX), Image.Resampling.LANCZOS)
        sprite.save(out / "objects" / f"{name.replace(' ', '_')}.webp", quality=90, method=6)
    _write_flat(next(packages.glob("iconify-json-fluent-emoji-flat-*/package")), out)
    hdri = next(packages.glob("pmndrs-assets-*/package/hdri"))
    for name in PANORAMAS:
        panorama = _tone_map(_read_exr_js(hdri / f"{name}.exr.js"))
        panorama.save(out / "panoramas" / f"{name}.jpg", quality=88, subsampling=0)
    _write_photographs(out / "photographs")
    fonts = next(packages.glob("fontsource-zcool-kuaile-*/package"))
    for script in ("latin", "chinese-simplified"):
        font = fonts / "files" / f"zcool-kuaile-{script}-400-normal.woff2"
        shutil.copyfile(font, out / "fonts" / f"zcool-kuaile-{script}.woff2")
    write_portraits(out / "portraits")


def _write_flat(package: Path, out: Path) -> None:
    """Each object's flat drawing, as large as its other one allows, standing in the same box."""
    icons = json.loads((package / "icons.json").read_text(encoding="utf-8"))
    names = json.loads((package / "chars.json").read_text(encoding="utf-8"))
    view = f"0 0 {icons['width']} {icons['height']}"
    for name, entry in OBJECTS.items():
        body = icons["icons"][names[entry.code_point.removesuffix("-fe0f")]]["body"]
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{view}">{body}</svg>'
        drawing = draw_svg(svg, 4 * SPRITE_PX)
        drawing = drawing.crop(drawing.getchannel("A").getbbox())
        file = f"{name.replace(' ', '_')}.webp"
        with Image.open(out / "objects" / file) as other:
            box = Image.new("RGBA", other.size)
        drawing.thumbnail(box.size, Image.Resampling.LANCZOS)
        box.paste(drawing, ((box.width - drawing.width) // 2, box.height - drawing.height))
        box.save(out / "flat" / file, quality=90, method=6)


def _read_exr_js(path: Path) -> np.ndarray:
    """The float RGB panorama (h, w, 3) that the package keeps as base64 OpenEXR in JavaScript."""
    import OpenEXR  # pyright: ignore[reportMissingImports] - of the assets extra

    match = re.search(r"base64,([A-Za-z0-9+/=]+)", path.read_text())
    if match is None:
        raise ValueError(f"{path} holds no base64 OpenEXR")
    raw = path.with_suffix(".tmp.exr")
    raw.write_bytes(base64.b64decode(match.group(1)))
    try:
        with OpenEXR.File(str(raw)) as file:
            return np.asarray(file.channels()["RGB"].pixels, np.float32)
    finally:
        raw.unlink()


def _tone_map(radiance: np.ndarray) -> Image.Image:
    """Exposure by the 60th percentile, Reinhard-like shoulder, display gamma.

    A negative channel marks an overflow of the packed format: those pixels are the brightest ones.
    """
    overflow = (radiance < 0).any(-1)
    radiance = radiance.clip(0)
    radiance[overflow] = radiance.max()
    exposed = radiance / (2.2 * np.quantile(radiance.mean(-1), 0.6) + 1e-6)
    display = (exposed / (1 + 0.6 * exposed)).clip(0, 1) ** (1 / 2.2)
    return Image.fromarray((display * 255).round().astype(np.uint8))


def _write_photographs(out: Path) -> None:
    import skimage.data  # pyright: ignore[reportMissingImports] - of the assets extra

    for name in PHOTOGRAPHS:
        pixels = getattr(skimage.data, name)()
        photograph = Image.fromarray(pixels).convert("RGB")
        photograph.thumbnail((PHOTOGRAPH_PX, PHOTOGRAPH_PX), Image.Resampling.LANCZOS)
        photograph.save(out / f"{name}.jpg", quality=88)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("packages", type=Path, help="folder of the unpacked npm packages")
    build(parser.parse_args().packages)
    names = json.dumps(sorted(p.name for p in ATLAS_DIR.iterdir()))
    parser.exit(0, f"wrote {names} under {ATLAS_DIR}\n")
