"""``step1x lora``: look into LoRA files, and change their layout."""

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from step1x_edit.apps.columns import columns, megabytes
from step1x_edit.apps.console import quieten, working
from step1x_edit.model.lora_layouts import Layout, LoraHeader, read_header

MAX_METADATA_CHARS = 200

app = typer.Typer(help="LoRA files: what they hold, and their layouts.", rich_markup_mode=None)


@app.command()
def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="a LoRA's .safetensors file")],
) -> None:
    """Say which layout, layers, ranks, alphas and metadata a LoRA has."""
    typer.echo("\n".join(lora_lines(read_header(file), file.stat().st_size)))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="a LoRA of any layout")],
    target: Annotated[Path, typer.Argument(metavar="DST", help=".safetensors file to write")],
    to: Annotated[Layout, typer.Option("--to", help="layout of DST")],
) -> None:
    """Write SRC in another layout; the same update, the metadata kept."""
    read_header(source)  # refuses before torch is imported
    with working("converting"):
        quieten()
        from step1x_edit.checkpoints.lora_convert import convert as convert_file

        was = convert_file(source, target, to)
    typer.echo(f"{target}  {was} to {to}")


def lora_lines(header: LoraHeader, size: int) -> list[str]:
    """What a LoRA is made of.

    Args:
        header: Of the file.
        size: Its size in bytes.
    """
    layers = header.layers.values()
    ranks = Counter(str(layer.rank) for layer in layers)
    alphas = Counter("none" if layer.alpha is None else f"{layer.alpha:g}" for layer in layers)
    rows = [
        ("layer", "rank", "alpha", "in", "out", "dtype"),
        *(
            (
                name,
                f"{layer.rank}",
                "-" if layer.alpha is None else f"{layer.alpha:g}",
                f"{layer.in_features}",
                f"{layer.out_features}",
                layer.dtype,
            )
            for name, layer in header.layers.items()
        ),
    ]
    notes = [
        f"  {name}: {value[:MAX_METADATA_CHARS]}{'…' if len(value) > MAX_METADATA_CHARS else ''}"
        for name, value in sorted(header.metadata.items())
    ]
    return [
        f"{header.label}: {header.layout} layout, {len(header.layers)} layers, {megabytes(size)}",
        f"rank {_counted(ranks)}; alpha {_counted(alphas)}; dtype "
        + _counted(Counter(layer.dtype for layer in layers)),
        *(["metadata:", *notes] if notes else ["no metadata"]),
        *columns(rows),
    ]


def _counted(values: Counter[str]) -> str:
    """One value, or each with how often it occurs."""
    if len(values) == 1:
        return next(iter(values))
    return ", ".join(f"{value} ({count} layers)" for value, count in values.most_common())
