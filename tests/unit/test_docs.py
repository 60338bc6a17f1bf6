"""What README and docs name exists: paths, modules, settings, options, recipes, links; and README stays one page.

A code span or a command of a document is a claim. Commands are those of blocks marked `sh`; they are parsed by the real
parsers, and their settings are loaded. `path::name` claims that the file defines the name.
"""

from __future__ import annotations

import argparse
import ast
import re
import shlex
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from data_prep.cli import parser as data_prep_parser
from tests.support.commands import ROOT, program, refused, targets
from vswin_dist.config import load_settings, recipe_names, recipe_text, to_flat
from vswin_dist.config.card import ENTRIES, card, entries
from vswin_dist.errors import ConfigError

DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "data_prep/README.md",
    ROOT / "infra/README.md",
    ROOT / "infra/kubernetes/README.md",
    ROOT / "infra/slurm/README.md",
    ROOT / "infra/aws/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
PICTURES = sorted((ROOT / "docs").glob("*.svg"))
SUFFIXES = (".py", ".md", ".toml", ".yaml", ".svg", ".png")
PACKAGES = ("vswin_dist", "data_prep", "infra", "jobs", "tests")
PROGRAMS = (  # every command line of the project
    *(f"jobs/{name}.py" for name in ("ablate", "compare", "evaluate", "export", "inflate", "predict", "promote", "train")),
    *(f"jobs/benchmark.py {kind}" for kind in ("checkpoint", "loader", "model", "prep", "serving", "views")),
    "infra/aws/with_hosts.py",
    "-m infra.aws.configure",
    "-m infra.local.aws_demo",
    "-m infra.local.cluster_demo",
    "-m infra.local.demo",
    "-m infra.local.fault_demo",
    "-m infra.local.hosts",
    "-m infra.local.image_demo",
    "-m infra.local.slurm_demo",
    "-m tests.support.plain",
    "-m vswin_dist.config",
    "-m vswin_dist.planning",
    "-m vswin_dist.serving",
    "-m vswin_dist.status",
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def prose(text: str) -> str:
    """The document without its blocks of code."""
    return FENCE.sub("", text)


def spans(text: str) -> list[str]:
    """The code spans of the prose."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(text))]


def commands(text: str) -> list[list[str]]:
    """The words of each command in the blocks marked `sh`."""
    blocks = [body.replace("\\\n", " ") for language, body in FENCE.findall(text) if language == "sh"]
    return [words for block in blocks for line in block.splitlines() if (words := shlex.split(line, comments=True))]


# --- what there is ----------------------------------------------------------------------------------------------


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """Every option of `parser` and of its commands."""
    found = set()
    for action in parser._actions:
        found |= set(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            found |= {option for one in action.choices.values() for option in options_of(one)}
    return found


@cache
def all_options() -> set[str]:
    """Every option of every program."""
    parsers = [data_prep_parser(), *(program(p.split())[0] for p in PROGRAMS)]
    return {option for parser in parsers for option in options_of(parser)}


@cache
def settings() -> set[str]:
    """The keys of all settings."""
    return set(to_flat(load_settings("demo", ["data.train=any"])))


@cache
def sources() -> str:
    """All source code."""
    return "\n".join(
        p.read_text() for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py")) if p != Path(__file__)
    )


@cache
def scripts() -> str:
    """All shell code."""
    return "\n".join(p.read_text() for p in sorted((ROOT / "infra/slurm").iterdir()) if p.suffix in (".sh", ".sbatch"))


def defined(path: Path, name: str) -> bool:
    """Whether the file at `path` defines `NAME` or `CLASS.NAME`."""
    body: list[ast.stmt] = ast.parse(path.read_text()).body
    for part in name.split("."):
        found = None
        for node in body:
            names = [node.name] if isinstance(node, (ast.ClassDef, ast.FunctionDef)) else []
            if isinstance(node, (ast.Assign, ast.AnnAssign)):
                names = [
                    t.id
                    for t in (node.targets if isinstance(node, ast.Assign) else [node.target])
                    if isinstance(t, ast.Name)
                ]
            found = node if part in names else found
        if found is None:
            return False
        body = getattr(found, "body", [])
    return True


def slugs(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# --- the checks: each gives what is wrong with a document ---------------------------------------------------------


def wrong_paths(text: str, folder: Path) -> Iterator[str]:
    """Paths that do not exist, and names that their files do not define."""
    top = {p.name for p in ROOT.iterdir()}
    for span in spans(text):
        path, _, name = span.split()[0].partition("::")
        if not re.fullmatch(r"[\w.][\w./-]*", path) or path.startswith(".."):
            continue
        if not (path.endswith(SUFFIXES) or path.split("/")[0] in top):
            continue
        found = next((base / path for base in (ROOT, folder) if (base / path).exists()), None)
        if found is None:
            yield f"{path} does not exist"
        elif name and not defined(found, name):
            yield f"{path} does not define {name}"


def wrong_modules(text: str, folder: Path) -> Iterator[str]:
    """Dotted names of modules, or of what stands in one, that do not exist."""
    for dotted in re.findall(rf"(?<![\w./-])(?:{'|'.join(PACKAGES)})(?:\.\w+)+", text):
        parts = dotted.split(".")
        if (
            (ROOT / Path(*parts[:-1], f"{parts[-1]}.py")).is_file()
            or (ROOT / Path(*parts)).is_dir()
            or parts[-1] in ("md", "py")
        ):
            continue
        owner = ROOT / Path(*parts[:-1])
        owner = owner / "__init__.py" if owner.is_dir() else owner.with_suffix(".py")
        if not owner.is_file() or not re.search(rf"\b{parts[-1]}\b", owner.read_text()):
            yield f"{dotted} does not exist"


def wrong_settings(text: str, folder: Path) -> Iterator[str]:
    """Settings that do not exist, or do not take the value."""
    groups = {key.split(".")[0] for key in settings()}
    for span in spans(text):
        key, equals, value = span.partition("=")
        if not re.fullmatch(rf"(?:{'|'.join(groups)})\.\w+", key) or key.endswith((".json", ".safetensors")):
            continue
        if key not in settings():
            yield f"{key} is not a setting"
        elif equals:
            try:
                load_settings("demo", ["data.train=any", "training.use_gpu=true", f"{key}={value}"])
            except ConfigError as error:
                yield str(error)


def wrong_options(text: str, folder: Path) -> Iterator[str]:
    """Options in code spans that no program has, and targets that the Makefile does not have."""
    for span in spans(text):
        words = span.split()
        if words[0] == "make":
            yield from (f"make {w} does not exist" for w in words[1:] if "=" not in w and w not in targets())
        elif words[0].startswith(("--", "data-prep", "jobs/")):
            yield from (f"{w} is not an option" for w in words if w.startswith("--") and w not in all_options())


def wrong_commands(text: str, folder: Path) -> Iterator[str]:
    """Commands that their programs refuse."""
    for words in commands(text):
        yield from (f"{shlex.join(words)}: {problem}" for problem in refused(words))


def wrong_preparations(text: str, folder: Path) -> Iterator[str]:
    """Sets for validation that have no `--split val` or take their class ids from themselves; 2D weights of no recipe."""
    text = text.replace("\\\n", " ")
    for line in re.findall(r"^.*(?:prepare\.py|data-prep shard) .*--out \S+/val\b.*$", text, re.MULTILINE):
        yield from (f"{line}: without {o}" for o in ("--split val", "--classes") if o not in line)
    for weights, recipe in re.findall(r"--weights \S*?(\w+\.pth) --recipe (\w+)", text):
        if weights not in recipe_text(recipe).splitlines()[0]:
            yield f"{recipe} does not start from {weights}"


def wrong_links(text: str, folder: Path) -> Iterator[str]:
    """Links to files or headings that do not exist."""
    for target in LINK.findall(prose(text)):
        path, _, anchor = target.partition("#")
        if target.startswith(("http://", "https://")):
            continue
        if not (folder / path).exists():
            yield f"the link to {path} leads nowhere"
        elif anchor and anchor not in slugs(folder / path):
            yield f"{path} has no heading #{anchor}"


def wrong_variables(text: str, folder: Path) -> Iterator[str]:
    """Environment variables of the project that no code reads."""
    for name in set(re.findall(r"\bVSWIN_\w+", text)):
        if f'"{name}"' not in sources() and f"${{{name}:-" not in scripts():
            yield f"no code reads {name}"


CHECKS: dict[Callable[[str, Path], Iterator[str]], str] = {  # each with a document that it must refuse
    wrong_paths: "see `vswin_dist/training/no_such_file.py` and `vswin_dist/errors.py::no_such_name`",
    wrong_modules: "see vswin_dist.no_such_module and vswin_dist.models.no_such_name",
    wrong_settings: "give `data.no_such_setting`, or `training.epochs=many`",
    wrong_options: "give `--no-such-option`, or `make no_such_target`",
    wrong_commands: "```sh\npython jobs/train.py --recipe demo --no-such-option\nmake no_such_target\n```",
    wrong_preparations: "data-prep shard --out s3://x/val --split val\n--weights x/swin_22k.pth --recipe k400_swin_l",
    wrong_links: "see [there](no_such_file.md) and [here](README.md#no-such-heading)",
    wrong_variables: "set VSWIN_NO_SUCH_VARIABLE or `VSWIN_NO_OTHER`",
}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_what_a_document_names_exists(check: Callable[[str, Path], Iterator[str]], document: Path) -> None:
    problems = list(check(document.read_text(), document.parent))
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("file", sorted((ROOT / "infra").rglob("*.yaml")), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_that_a_file_of_infra_names_exists(file: Path) -> None:
    assert list(wrong_modules(file.read_text(), file.parent)) == []


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_a_check_finds_what_is_wrong(check: Callable[[str, Path], Iterator[str]]) -> None:
    assert len(list(check(CHECKS[check], ROOT))) == 2


@pytest.mark.parametrize(
    "command",
    [
        "python jobs/train.py --recipe no_such_recipe",
        "python jobs/train.py --recipe k400_swin_l training.workers=16",
        "python jobs/train.py --recipe demo optim.lr=-1",
        "ray job submit --no-such-option -- python jobs/train.py --recipe demo",
        "data-prep shard folder --videos DIR",
        "python jobs/ablate.py --table 4 22k_*:model.no_such_setting=1",
        "no-such-program --help",
    ],
)
def test_a_wrong_command_is_refused(command: str) -> None:
    assert len(list(refused(shlex.split(command)))) == 1


@pytest.mark.parametrize("picture", PICTURES, ids=lambda p: p.name)
def test_what_a_picture_names_exists(picture: Path) -> None:
    text = picture.read_text()
    assert list(wrong_modules(text, ROOT)) == []
    assert [path for path in re.findall(r"jobs/\w+\.py", text) if not (ROOT / path).is_file()] == []


def test_the_table_of_recipes_is_whole_and_has_their_scores() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([^|]*) \|$", (ROOT / "docs/recipes.md").read_text(), re.MULTILINE)
    assert sorted(name for name, _ in rows) == [name for name in recipe_names() if not name.startswith("ablation_table")]
    for name, scores in rows:
        for score in re.findall(r"[\d.]+ / [\d.]+", scores):
            assert score in recipe_text(name), name


def test_the_card_is_whole_has_what_the_recipes_say_and_stands_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    assert card(list(ENTRIES)) in readme, "python -m vswin_dist.config card prints it"
    assert sorted(e.recipe for e in entries()) == recipe_names()
    measured = {e.recipe: e.measured for e in ENTRIES}
    [row] = re.findall(r"^\| top-1 of 300 validation videos, (seeds .*) \| (.*) \|$", readme, re.MULTILINE)
    assert measured["demo"] == f"top-1 of {row[1].replace('%', '')} ({row[0]})"
    for entry in entries():
        text = recipe_text(entry.recipe)
        assert all(score in text for score in re.findall(r"[\d.]+ / [\d.]+", entry.published)), entry.recipe
        assert entry.recipe == "demo" or "Not run here." in text, entry.recipe


def test_the_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 120
