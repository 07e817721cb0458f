"""``step1x data``: make datasets and look at them."""

from pathlib import Path
from typing import Annotated

import typer

from step1x_edit.apps.console import quieten, working

app = typer.Typer(help="Make training data and look at it.")

Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="print errors only")]


@app.command()
def generate(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="see configs/data")],
    num: Annotated[int | None, typer.Option("--num", help="records, instead of the file's")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="instead of the file's")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="folder of the shards, instead of the file's")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Make the (instruction, source, target) triplets of CONFIG.yaml.

    The same command goes on where a killed one stopped.
    """
    from step1x_edit.datagen import generate as engine
    from step1x_edit.datagen.config import load_config

    run = load_config(config, num=num, seed=seed, out=out)
    with working(f"making {run.num} records in {run.out}", quiet=quiet, steps=True) as bar:
        summary = engine.generate(run, bar)
    if not quiet:
        typer.echo("\n".join([*summary.lines(), str(run.out)]))


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="a dataset's folder")],
    out: Annotated[Path, typer.Option("--out", help="folder of the pictures and metadata.json")],
    language: Annotated[str, typer.Option("--language", help="of the captions: en or zh")] = "en",
    quiet: Quiet = False,
) -> None:
    """Write a dataset as pictures and the metadata JSON that the official trainer reads."""
    from step1x_edit.datagen.official_metadata import export as write_official

    with working(f"exporting {folder}", quiet=quiet, steps=True) as bar:
        metadata = write_official(folder, out, language, bar)
    if not quiet:
        typer.echo(str(metadata))


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="a dataset's folder")],
    out: Annotated[
        Path | None, typer.Option("-o", "--output", help="the page; FOLDER/inspect.html by default")
    ] = None,
    items: Annotated[int, typer.Option("--items", min=1, help="shown of each category")] = 24,
    quiet: Quiet = False,
) -> None:
    """Write a page that a person can judge a dataset by in a minute."""
    from step1x_edit.datagen.inspect import write_page

    with working(f"reading {folder}", quiet=quiet, steps=True) as bar:
        page = write_page(folder, out or folder / "inspect.html", items, bar)
    if not quiet:
        typer.echo(str(page))


@app.command("filter")
def filter_(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="a dataset's folder")],
    out: Annotated[Path, typer.Option("--out", help="folder of the records that are kept")],
    read_text: Annotated[
        bool, typer.Option("--read-text", help="drop text edits whose new text cannot be read")
    ] = False,
    safety: Annotated[
        bool, typer.Option("--safety", help="drop what a classifier rates as unsafe")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Keep the records that pass every check, and count the others by reason.

    --read-text and --safety run small models of the extra `photos`.
    """
    from step1x_edit.datagen.filters import default_checks
    from step1x_edit.datagen.onnx_parts import OpenNsfw, RapidOcr
    from step1x_edit.datagen.refine import refine

    checks = default_checks(
        reader=RapidOcr() if read_text else None, rater=OpenNsfw() if safety else None
    )
    with working(f"filtering {folder}", quiet=quiet, steps=True) as bar:
        drops = refine(folder, out, checks, bar)
    if not quiet:
        typer.echo("\n".join([*drops.lines(), str(out)]))


@app.command()
def photographs(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="photographs, pairs of frames, videos")
    ],
    out: Annotated[Path, typer.Option("--out", help="folder of the shards")],
    num: Annotated[int, typer.Option("--num", min=1, help="records wanted")] = 200,
    seed: Annotated[int, typer.Option("--seed", min=0, max=65535, help="another one, others")] = 0,
    size: Annotated[str, typer.Option("--size", help="WIDTHxHEIGHT in pixels")] = "256x256",
    labels: Annotated[
        Path | None,
        typer.Option("--labels", help='JSON: file name → {"en": subject, "zh": the same}'),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML: the models to use, see docs/data.md")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Make triplets of photographs, keep those that pass every check, and count the others."""
    from step1x_edit.datagen.config import parse_size, read_yaml
    from step1x_edit.datagen.photographs.config import (
        PartsConfig,
        build_checks,
        build_parts,
        read_labels,
    )
    from step1x_edit.datagen.photographs.run import Run, make_dataset
    from step1x_edit.datagen.photographs.sources import sources_in
    from step1x_edit.datagen.shards import new_folder

    chosen = PartsConfig() if config is None else read_yaml(config, PartsConfig)
    if config is not None:
        quieten()
    names = {} if labels is None else read_labels(labels)
    run = Run(folder, out, num, seed, parse_size(size), labels=names)
    # Before models are loaded, which may take minutes.
    sources_in(folder)
    new_folder(out)
    with working(f"making {num} records in {out}", quiet=quiet, steps=True) as bar:
        report = make_dataset(run, build_parts(chosen), build_checks(chosen), bar)
    if not quiet:
        typer.echo("\n".join([*report.lines(), str(out)]))
