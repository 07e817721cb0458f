"""The command line, `step1x`: parse, build a request, call `Editor`, save, say where.

Nothing here imports torch before a request has been found good; `--help` never does.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer
from typer.exceptions import TyperException

from step1x_edit.apps import data, lora, options
from step1x_edit.apps.console import (
    BAD_REQUEST,
    DONE,
    FAILED,
    complain,
    explain,
    is_interrupt,
    notes_afterwards,
    quieten,
    working,
)
from step1x_edit.apps.start import INTERRUPTED
from step1x_edit.apps.train import train
from step1x_edit.checkpoints.catalog import DEFAULT_MODEL
from step1x_edit.errors import InvalidRequest
from step1x_edit.request import EditRequest, ModelForm, RuntimeConfig

if TYPE_CHECKING:
    from step1x_edit.editor import Editor

app = typer.Typer(
    name="step1x",
    help="Edit a picture by telling it what to change.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich would double what `--help` costs
    context_settings={"help_option_names": ["-h", "--help"]},
)
models_app = typer.Typer(help="The models that can be named, and what a folder holds.")
app.add_typer(models_app, name="models", no_args_is_help=True)
bench_app = typer.Typer(help="Measure a model.")
app.add_typer(bench_app, name="bench", no_args_is_help=True)
app.add_typer(data.app, name="data", no_args_is_help=True)
app.add_typer(lora.app, name="lora", no_args_is_help=True)
app.command()(train)

Output = Annotated[Path, typer.Option("-o", "--output", help="file to write: .png, .jpg, .webp …")]
Model = Annotated[
    str,
    typer.Option(
        "--model", help="a name of `step1x models list`, a model folder or file, or a hub name"
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="results may replace their sources")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="print errors only")]
AsJson = Annotated[bool, typer.Option("--json", help="print the result as one line of JSON")]


@app.callback()
def _global_options(
    debug: Annotated[bool, typer.Option("--debug", help="show where an error comes from")] = False,
) -> None:
    # `main` reads --debug before anything can fail; it stands here for the help.
    del debug


@app.command()
@options.with_settings(options.EDIT_FLAGS)
def edit(
    picture: Annotated[str, typer.Argument(metavar="PICTURE", help="the picture to edit")],
    instruction: Annotated[
        str, typer.Argument(metavar="INSTRUCTION", help="what to change; English or Chinese")
    ],
    output: Output,
    model: Model = DEFAULT_MODEL,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    *,
    settings: dict[str, Any],
    runtime: RuntimeConfig,
) -> None:
    """Edit PICTURE as INSTRUCTION says.

    The result has the picture's own size, and what the edit did not change is left as it was.
    """
    request = options.build(EditRequest, {"image": picture, "prompt": instruction, **settings})
    _make(request, runtime, output, model, overwrite=overwrite, quiet=quiet, as_json=as_json)


@app.command()
@options.with_settings(options.DRAW_FLAGS)
def generate(
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="what to draw; English or Chinese")
    ],
    output: Output,
    model: Model = DEFAULT_MODEL,
    quiet: Quiet = False,
    as_json: AsJson = False,
    *,
    settings: dict[str, Any],
    runtime: RuntimeConfig,
) -> None:
    """Draw a picture from PROMPT alone."""
    request = options.build(EditRequest, {"prompt": prompt, **settings})
    _make(request, runtime, output, model, overwrite=False, quiet=quiet, as_json=as_json)


@app.command()
@options.with_settings(options.PICTURE_FLAGS, defaults={"seed": 42})
def batch(
    prompts: Annotated[
        Path, typer.Argument(metavar="JSON", help='{"picture name": "instruction", …}')
    ],
    input_dir: Annotated[Path, typer.Option("--input-dir", help="folder of the pictures")],
    output_dir: Annotated[Path, typer.Option("--output-dir", help="folder of the results")],
    model: Model = DEFAULT_MODEL,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    *,
    settings: dict[str, Any],
    runtime: RuntimeConfig,
) -> int:
    """Edit every picture that JSON names.

    Results keep the names. What is done already, by the same model with the same settings, is
    skipped; what fails is named at the end, with exit code 1.
    """
    from step1x_edit.apps.batch import Batch

    plan = Batch.read(prompts, input_dir, output_dir, settings, overwrite=overwrite)
    plan.look_for_done(model, runtime, quiet=quiet)
    if plan.pending:
        with notes_afterwards(quiet=quiet):
            plan.run(_load(model, runtime, quiet=quiet), quiet=quiet)
    for name, reason in plan.failed.items():
        complain(f"{name}: {reason}")
    if not quiet:
        typer.echo(plan.summary())
    return FAILED if plan.failed else DONE


@models_app.command("list")
def models_list() -> None:
    """Name the models."""
    from step1x_edit.apps.inspect_model import catalogue_lines

    typer.echo("\n".join(catalogue_lines()))


@models_app.command("show")
def models_show(
    model: Annotated[
        str, typer.Argument(help="a name of `step1x models list`, or a model folder or file")
    ],
) -> None:
    """Say what a model is made of."""
    from step1x_edit.apps.inspect_model import model_lines

    typer.echo("\n".join(model_lines(model)))


@models_app.command("pull")
def models_pull(
    model: Annotated[
        str,
        typer.Argument(
            help="a name of `step1x models list`, a hub name, or `constants`: the release's texts "
            "that a released model needs"
        ),
    ],
    source: Annotated[
        str, typer.Option("--from", metavar="huggingface|modelscope", help="the hub to ask")
    ] = "huggingface",
    official_source: Annotated[
        Path | None,
        typer.Option(
            "--official-source", help="checkout of the official repository to take the texts from"
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Fetch a model, going on where an earlier try stopped, and check every byte of it."""
    from step1x_edit.apps.pull import pull

    say = (lambda _: None) if quiet else typer.echo
    pull(model, source, official_source, say=say, quiet=quiet)


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="a model, or an official transformer file")
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="what to write; must not exist")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="|".join(get_args(ModelForm)),
            help="diffusers: a folder; official: the transformer as one file; fp8, int8, int4: a "
            "folder with the blocks' weights in fewer bits, which runs as it is",
        ),
    ],
    quiet: Quiet = False,
) -> None:
    """Write a model in another layout, or in fewer bits."""
    from step1x_edit.apps import checks

    place = checks.check_conversion(source, target, to)
    with working(f"writing {target}", quiet=quiet):
        quieten()
        from step1x_edit.runtime.convert import convert as write

        written = write(place, target, cast("ModelForm", to))
    if not quiet:
        for file in written:
            typer.echo(str(file))


@bench_app.command("mini")
@options.with_settings({"num_steps": "--steps", "guidance": "--guidance"})
def bench_mini(
    items: Annotated[int, typer.Option("--items", min=1, help="of each category")] = 60,
    out: Annotated[
        Path | None, typer.Option("--out", help="folder for contact sheets and scores")
    ] = None,
    model: Model = DEFAULT_MODEL,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the table as JSON")] = False,
    category: Annotated[
        list[str] | None,
        typer.Option("--category", help="one to measure; again for more; default: all eleven"),
    ] = None,
    first: Annotated[
        int, typer.Option("--first", min=0, help="number of the first item: others are other ones")
    ] = 0,
    *,
    settings: dict[str, Any],
    runtime: RuntimeConfig,
) -> None:
    """Edit held-out pictures whose right answers are known, and print how near it came."""
    request = options.build(EditRequest, {"prompt": "only to check the settings", **settings})
    from step1x_edit.benchmark import minibench

    categories = minibench.chosen_categories(category or ())
    editor = _load(model, runtime, quiet=quiet)
    with working("measuring", quiet=quiet, steps=True) as bar:
        scores = minibench.run(
            editor, items, categories, first=first, out=out, on_item=bar,
            num_inference_steps=request.num_steps, guidance_scale=request.guidance,
        )  # fmt: skip
    if as_json:
        typer.echo(minibench.as_json(scores))
    else:
        typer.echo(minibench.markdown(scores))


@app.command()
@options.with_settings(
    {"size_level_px": "--size-level", "guidance": "--guidance"},
    runtime_flags={name: options.RUNTIME_FLAGS[name] for name in ("dtype", "device")},
)
def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG]", help="with --train: as `step1x train` takes it"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="tell how much memory each setting takes with this model"),
    ] = None,
    for_training: Annotated[
        bool, typer.Option("--train", help="of training a LoRA, by default with default settings")
    ] = False,
    *,
    settings: dict[str, Any],
    runtime: RuntimeConfig,
) -> int:
    """Say what this machine can run; with a model or a size, which settings fit it.

    --train tells the same of training.

    --device cuda tells of GPUs on any machine.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if config is not None and not for_training:
        raise InvalidRequest(f"{config}: a run is looked at with --train: doctor --train {config}")
    if for_training and "guidance" in given:
        raise InvalidRequest("--guidance is of editing: leave it out beside --train")
    if model is None and not given and not for_training:
        from step1x_edit.apps.doctor import examine

        with working("looking around"):
            report = examine()
        typer.echo("\n".join(report.lines))
        return DONE if report.healthy else FAILED
    picture = {"image": Path("of any picture"), "prompt": "only to check the settings"}
    request = options.build(EditRequest, {**picture, **given})
    with working("estimating", steps=True) as bar:
        quieten()
        if for_training:
            from step1x_edit.apps import training_fit

            run = training_fit.read_run(config, model, request.size_level_px)
            lines = training_fit.memory_lines(run, runtime, on_progress=bar)
        else:
            from step1x_edit.apps.fitting import memory_lines

            lines = memory_lines(model or DEFAULT_MODEL, request, runtime, on_progress=bar)
    typer.echo("\n".join(lines))
    return DONE


def _make(
    request: EditRequest,
    runtime: RuntimeConfig,
    out: Path,
    model: str,
    *,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Check, load, run, save, say where."""
    from step1x_edit.apps import checks
    from step1x_edit.checkpoints.lora import check_loras

    sources = [file for file in (request.image, request.mask) if isinstance(file, Path)]
    targets = checks.check_outputs(out, request.num_images, sources, overwrite=overwrite)
    picture = checks.check_pictures(request)
    local = checks.check_model(model)
    checks.check_size(picture, request, local)
    check_loras(runtime.lora, local and local.components["transformer"])
    editor = _load(model, runtime, quiet=quiet)
    with notes_afterwards(quiet=quiet):
        with working("editing" if sources else "drawing", quiet=quiet, steps=True) as bar:
            result = editor.edit(request, on_progress=bar)
        written = result.save(targets)
    seconds = sum(result.seconds.values())
    if as_json:
        said = {"images": [str(path) for path in written], "seconds": result.seconds}
        typer.echo(json.dumps(said | result.provenance.model_dump(), ensure_ascii=False))
    elif not quiet:
        for path in written:
            typer.echo(f"{path}  seed {result.provenance.seed}  {seconds:.1f} s")


def _load(model: str, runtime: RuntimeConfig, *, quiet: bool) -> "Editor":
    from step1x_edit.apps.pull import ensure

    ensure(model, runtime, say=(lambda _: None) if quiet else complain, quiet=quiet)
    with working(f"loading {model}", quiet=quiet):
        quieten()
        from step1x_edit.editor import Editor

        return Editor.load(model, runtime)


def run(arguments: Sequence[str]) -> int:
    """Carry out one command and give back its exit code: 0, 1, 2 or 130."""
    # --debug may stand anywhere before "--".
    head = list(arguments).index("--") if "--" in arguments else len(arguments)
    debug = "--debug" in arguments[:head]
    rest = [word for i, word in enumerate(arguments) if i >= head or word != "--debug"]
    try:
        code = app(rest, prog_name="step1x", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except TyperException as error:  # what the parser refuses
        message = error.format_message()
        if message.startswith("Usage:"):  # no command: the help itself
            typer.echo(message)
        else:
            complain(f"{message} (`step1x --help` lists what there is)")
        return BAD_REQUEST
    except Exception as error:
        if is_interrupt(error):
            code = INTERRUPTED
        elif debug:
            raise
        else:
            message, code = explain(error)
            complain(options.with_flags(message))
            return code
    if code == INTERRUPTED:
        complain("interrupted; nothing was left half-written")
    return code if isinstance(code, int) else DONE


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))
