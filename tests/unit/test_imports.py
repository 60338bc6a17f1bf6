"""The architecture's rules: imports run one way, heavy packages have one home each, and importing is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = [  # a module imports from its own layer and those before it
    {"errors"}, {"storage"}, {"manifest"}, {"config"}, {"models", "data", "tracking", "evaluation.metrics"},
    {"serving"}, {"evaluation"}, {"training"}, {"planning"},
]
HOMES = {"ray": "vswin_dist/training/cluster.py", "deepspeed": "vswin_dist/training/engine.py",
         "mlflow": "vswin_dist/tracking/backend.py"}


def imports(path: Path) -> set[str]:
    """Every module named by an import statement of `path`, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    return found


def layer(module: str) -> int:
    """The number of the layer of ``vswin_dist.X...``."""
    name = module.removeprefix("vswin_dist.")
    return next(i for i, names in enumerate(LAYERS) if any(name == n or name.startswith(f"{n}.") for n in names))


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def test_imports_run_one_way() -> None:
    for path in sources("vswin_dist"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if module == "vswin_dist":
            continue
        for name in imports(path):
            if name.startswith("vswin_dist.") and name.count(".") >= 1:
                assert layer(name) <= layer(module), f"{module} imports {name}"


def test_models_know_nothing_of_data_and_training() -> None:
    for path in sources("vswin_dist/models"):
        ours = {n.split(".")[1] for n in imports(path) if n.startswith("vswin_dist.")}
        assert ours <= {"models", "errors", "storage"}, path


def test_data_prep_needs_no_torch() -> None:
    for path in sources("data_prep"):
        names = imports(path)
        assert not {n.split(".")[0] for n in names} & {"torch", "deepspeed", "mlflow"}, path
        assert {n.split(".")[1] for n in names if n.startswith("vswin_dist.")} <= {"errors", "storage", "manifest"}, path


@pytest.mark.parametrize("package", HOMES)
def test_heavy_packages_have_one_home(package: str) -> None:
    users = {str(p.relative_to(ROOT)) for p in sources("vswin_dist")
             if any(n == package or n.startswith(f"{package}.") for n in imports(p))}
    assert users <= {HOMES[package]}


def test_importing_is_cheap() -> None:
    code = "import sys, vswin_dist; print([m for m in ('torch', 'ray', 'av', 'mlflow', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_jobs_are_short() -> None:
    for path in sources("jobs"):
        assert len(path.read_text().splitlines()) <= 60, path


def test_a_newcomers_path_is_short() -> None:
    parts = ["jobs/train.py", "vswin_dist/training/launch.py", "vswin_dist/training/loop.py"]
    assert sum(len((ROOT / p).read_text().splitlines()) for p in parts) < 600
