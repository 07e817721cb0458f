"""Text files that are written whole or not at all."""

from pathlib import Path


def write_text(path: Path, text: str) -> Path:
    """Write UTF-8 text beside a path, rename it, and give the path back.

    Raises:
        OSError: The place cannot be written; what stood there stands.
    """
    beside = path.with_name(f"{path.name}.new")
    try:
        beside.write_text(text, encoding="utf-8")
        return beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
