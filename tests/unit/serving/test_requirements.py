"""A registered model brings its code and names its packages: no others may be needed where it is loaded."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vswin_dist
from vswin_dist.serving import PYFUNC_CODE
from vswin_dist.tracking.code import copy_needed
from vswin_dist.tracking.registry import REQUIREMENTS

LOAD = """
import sys
code, absent = sys.argv[1], set(sys.argv[2:])
class Absent:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent)
from mlflow.pyfunc import model
print(type(model._load_model_code_path(code, None)).__name__)
import vswin_dist
print(vswin_dist.__file__)
"""


def plain(name: str) -> str:
    """The name of a package as indices know it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def needed_by(packages: tuple[str, ...]) -> set[str]:
    """`packages` and all that they ask for, as installed here."""
    found: set[str] = set()
    waiting = list(packages)
    while waiting:
        if (name := plain(waiting.pop())) not in found:
            found.add(name)
            try:
                wanted = metadata.requires(name) or []
            except metadata.PackageNotFoundError:  # of another platform
                continue
            waiting += [re.split(r"[^\w.-]", text)[0] for text in wanted if "extra ==" not in text]
    return found


@pytest.mark.slow
def test_a_registered_model_loads_from_what_it_brings_where_its_requirements_alone_are_installed(tmp_path: Path) -> None:
    brought = copy_needed(PYFUNC_CODE, Path(vswin_dist.__file__).parent, tmp_path)
    parts = {path.relative_to(brought).parts[0] for path in brought.rglob("*.py")}
    assert {"models", "serving"} <= parts and not parts & {"training", "evaluation", "benchmarks"}
    known = needed_by(REQUIREMENTS)
    absent = [m for m, owners in metadata.packages_distributions().items() if not {plain(o) for o in owners} & known]
    absent = [module for module in absent if module not in ("vswin_dist", "setuptools", "pip", "_distutils_hack")]
    assert {"ray", "deepspeed"} <= set(absent)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", LOAD, str(PYFUNC_CODE), *absent]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"VideoSwinModel\n{brought}/__init__.py\n"
