"""What the repository says of itself: README, docs, make targets and licences, against the tree."""

import importlib.metadata
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from step1x_edit.checkpoints.catalog import MINI_FOLDER

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "step1x_edit"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = sorted(
    ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in SOURCE.rglob("*.py")
)
BIN = Path(sys.executable).parent
needs_mini = pytest.mark.skipif(
    not (MINI_FOLDER / "model_index.json").exists(),
    reason="the mini's weights are not in this tree",
)


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def commands():
    """Every command of a bash block, as (page, words)."""
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.splitlines():
                for command in line.split("&&"):
                    if words := shlex.split(command, comments=True):
                        yield page.name, tuple(words)


COMMANDS = list(dict.fromkeys(commands()))
STEP1X = list(dict.fromkeys(words for _, words in COMMANDS if words[0] == ".venv/bin/step1x"))
PYTHON = [(page, block) for page in PAGES for block in blocks(page, "python")]


def run(*words, **options):
    return subprocess.run(words, capture_output=True, text=True, check=False, **options)


# ---- the map


def test_the_map_has_one_line_for_each_source_file():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("## Map of")[1]
    mapped = re.findall(r"^\| `([^`]+\.py)` \| .{10,} \|$", section, re.M)
    files = [str(p.relative_to(SOURCE)) for p in SOURCE.rglob("*.py") if p.stat().st_size]
    assert sorted(mapped) == sorted(files)


# ---- commands


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda value: str(value)[:60])
def test_every_command_exists(page, words):
    program, *rest = words
    if program == "make":
        done = run("make", "--dry-run", *rest, cwd=ROOT)
        assert done.returncode == 0, done.stderr
    elif program.startswith(".venv/bin/"):
        assert (BIN / Path(program).name).exists(), f"{page}: {program}"
    else:
        assert program in ("git", "cd"), f"{page}: {program} is not explained"


@pytest.mark.parametrize("words", STEP1X, ids=" ".join)
def test_every_step1x_command_and_option_is_in_the_help(words):
    names = []
    for word in words[1:]:
        if not re.fullmatch(r"[a-z]+", word) or len(names) == 2:
            break
        names.append(word)
    names = names[:2] if names[:1] in (["models"], ["bench"], ["lora"]) else names[:1]
    done = run(str(BIN / "step1x"), *names, "--help", env={"COLUMNS": "200", "TERM": "dumb"})
    assert done.returncode == 0, done.stderr
    for option in [word for word in words if word.startswith("-")]:
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", done.stdout), f"{names} has no {option}"


@needs_mini
@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        words
        for words in STEP1X
        # These have tests of their own.
        if words[1] not in ("batch", "bench", "lora", "train")
        and not {"--lora", "pull"} & set(words)
    ],
    ids=lambda words: " ".join(words[1:]),
)
def test_every_step1x_command_runs(words, workspace):
    done = run(str(BIN / "step1x"), *words[1:], cwd=workspace)
    assert done.returncode == 0, done.stderr
    if "-o" in words:
        assert (workspace / words[words.index("-o") + 1]).stat().st_size > 0


@needs_mini
@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "code"), PYTHON, ids=[f"{page.name}-{i}" for i, (page, _) in enumerate(PYTHON)]
)
def test_every_python_block_runs(page, code, workspace):
    done = run(sys.executable, "-c", code, cwd=workspace)
    assert done.returncode == 0, f"{page.name}: {done.stderr}"


@pytest.fixture
def workspace(tmp_path):
    """A folder with the examples and an empty `out`, as a command of the README finds them."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "out").mkdir()
    return tmp_path


def test_help_answers_without_torch():
    program = (
        "import sys; from step1x_edit.apps.cli import run; code = run(['--help']); "
        "heavy = {'torch', 'diffusers', 'transformers', 'scipy'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else code)"
    )
    done = run(sys.executable, "-c", program)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_every_named_path_exists(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
    for path in re.findall(r"`((?:src|tests|docs|configs|examples|perf)/[\w./]+)`", text):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`(step1x_edit(?:\.\w+)+)`|^::: (step1x_edit[\w.]+)", text, re.M):
        assert any(
            "".join(name) == module or "".join(name).startswith(f"{module}.") for module in MODULES
        ), name


# ---- tools


def test_pre_commit_runs_what_make_check_runs():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook["entry"] for repo in config["repos"] for hook in repo["hooks"]]
    planned = run(
        "make", "--no-print-directory", "--dry-run", "check", "-o", ".venv/dev.stamp", cwd=ROOT
    ).stdout
    assert hooks == planned.splitlines()


def test_ci_runs_check_and_then_test():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if line.startswith("make")] == ["make check", "make test"]
    assert "set -euo pipefail" in lines


def test_constraints_pin_everything_that_the_dev_extra_needs():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {
        canonicalize_name(requirement.name): str(requirement.specifier)
        for requirement in map(Requirement, [line for line in lines if line[:1] != "#"])
    }
    assert all(re.fullmatch(r"==[\w.]+", pin) for pin in pins.values()), pins
    needed = distributions("dev") - {"step1x-edit"}
    assert needed <= set(pins), f"not pinned: {sorted(needed - set(pins))}"


# ---- modules


def distributions(*extras):
    """Everything that the package with these extras needs, itself included, by its metadata."""
    found, open_ = set(), [("step1x-edit", frozenset(extras))]
    seen = set()
    while open_:
        name, wanted = open_.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        found.add(canonicalize_name(name))
        for requirement in map(Requirement, requires):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": e}) for e in (wanted or {""})):
                open_.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return found


IMPORT_ALL = """
import importlib, importlib.metadata, sys
from packaging.utils import canonicalize_name

from step1x_edit.checkpoints.catalog import MINI_FOLDER

allowed, modules = set(sys.argv[1].split()), sys.argv[2].split()
owners = importlib.metadata.packages_distributions()
finders = list(sys.meta_path)

class BaseInstall:
    def find_spec(self, name, path=None, target=None):
        owning = owners.get(name.partition(".")[0])
        if owning and not allowed.intersection(map(canonicalize_name, owning)):
            return None  # as if it were not installed
        specs = (finder.find_spec(name, path, target) for finder in finders)
        return next((spec for spec in specs if spec is not None), None)

    def find_distributions(self, *arguments):
        return importlib.metadata.MetadataPathFinder.find_distributions(*arguments)

sys.meta_path[:] = [BaseInstall()]
for module in modules:
    importlib.import_module(module)
"""


def test_every_module_imports_with_the_base_install():
    base = distributions()
    assert "torch" in base
    assert "pytest" not in base
    done = run(sys.executable, "-c", IMPORT_ALL, " ".join(base), " ".join(MODULES))
    assert done.returncode == 0, done.stderr[-2000:]


def test_public_names_are_importable_and_listed():
    import step1x_edit

    assert set(step1x_edit.__all__) <= set(dir(step1x_edit))
    for name in step1x_edit.__all__:
        assert getattr(step1x_edit, name).__name__ == name
    assert step1x_edit.__version__ == importlib.metadata.version("step1x-edit")


# ---- assets


def test_every_shipped_picture_is_in_the_licence_table():
    text = (SOURCE / "assets" / "README.md").read_text(encoding="utf-8")
    for folder in (SOURCE / "assets" / "atlas").iterdir():
        kinds = (".webp", ".jpg", ".woff2")
        pictures = [path for path in folder.iterdir() if path.suffix in kinds]
        row = re.search(rf"^\| `atlas/{folder.name}` \| (\d+) ", text, re.M)
        assert row, folder.name
        assert int(row[1]) == len(pictures)
    for path in (SOURCE / "assets" / "atlas" / "photographs").glob("*.jpg"):
        assert f"| `{path.stem}` |" in text
    assert "Microsoft" in (SOURCE / "assets" / "atlas" / "objects" / "LICENSE").read_text()
