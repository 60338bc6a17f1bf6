"""The architecture's rules: imports run one way, heavy packages have one home each, and importing is cheap."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = [  # a module imports from its own layer and those before it
    {"errors", "choices", "randomness", "local_files", "pages", "charts"},
    {"storage", "video"},
    {"records", "columns", "node_cache"},
    {"parquet", "lease"},
    {"manifest"},
    {"pictures"},
    {"config"},
    {"model_card", "device"},
    {"cluster", "models", "data", "tracking", "evaluation.metrics"},
    {"serving", "export"},
    {"evaluation", "planning.memory", "planning.hardware", "planning.throughput"},
    {"training"},
    {"benchmarks", "planning", "status"},
]
HOMES = {
    "ray": {  # of each of its libraries
        "vswin_dist/cluster.py",
        "vswin_dist/serving/ray_data.py",
        "vswin_dist/serving/ray_serve.py",
    },
    "deepspeed": {"vswin_dist/training/deepspeed_setup.py"},
    "mlflow": {"vswin_dist/tracking/backend.py"},
}


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
    """The number of the layer of `vswin_dist.X...`."""
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


def paths(tree: ast.AST) -> set[str]:
    """Every text of `tree` with what `/`, or a call's arguments, join it to; docstrings are left out."""
    docstrings = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}

    def parts(node: ast.AST) -> list[str]:
        if isinstance(node, ast.Constant):
            return [node.value] if isinstance(node.value, str) and id(node) not in docstrings else []
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            return parts(node.left) + parts(node.right)
        if isinstance(node, ast.Call):
            return [p for a in node.args for p in parts(a)]
        return []

    return {"/".join(parts(node)) for node in ast.walk(tree)}


def modules_at(path: str) -> set[str]:
    """The modules of ours that `path` may name, as a file or with dots, whatever folder stands before them."""
    if not (path.endswith(".py") or path.startswith("vswin_dist.")):
        return set()
    words, known = re.split("[/.]", path.removesuffix(".py")), {n.partition(".")[0] for names in LAYERS for n in names}
    return {".".join(words[i:]) for i, word in enumerate(words) if word in known}


@pytest.mark.slow
def test_no_module_reaches_a_higher_one_by_path() -> None:
    for path in sources("vswin_dist"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if module != "vswin_dist":
            for name in {n for p in paths(ast.parse(path.read_text())) for n in modules_at(p)}:
                assert layer(name) <= layer(module), f"{module} reaches {name} by path"


@pytest.mark.parametrize(
    "code",
    [
        'folder / "serving" / "pyfunc_model.py"',
        'open("vswin_dist/serving/pyfunc_model.py")',
        'Path(root, "serving", "pyfunc_model.py")',
        'folder.joinpath("serving/pyfunc_model.py")',
        'import_module("vswin_dist.serving.predict")',
    ],
)
def test_paths_to_modules_are_seen(code: str) -> None:
    assert {n.partition(".")[0] for p in paths(ast.parse(code)) for n in modules_at(p)} == {"serving"}


def test_models_know_nothing_of_data_and_training() -> None:
    for path in sources("vswin_dist/models"):
        ours = {n.split(".")[1] for n in imports(path) if n.startswith("vswin_dist.")}
        assert ours <= {"models", "errors", "choices", "storage", "model_card"}, path


def test_models_need_torch_numpy_and_safetensors_alone() -> None:
    for path in sources("vswin_dist/models"):
        theirs = {n.split(".")[0] for n in imports(path)} - sys.stdlib_module_names - {"vswin_dist"}
        needed = {"triton"} if path.name.startswith("triton_") else set()
        assert theirs <= {"torch", "numpy", "safetensors"} | needed, path


@pytest.mark.slow
def test_benchmarks_alone_import_tests() -> None:
    """By a statement, or by a name that is handed to `importlib`."""
    users = set()
    for path in [p for package in ("vswin_dist", "data_prep", "jobs", "infra") for p in sources(package)]:
        texts = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        named = {text for text in texts if isinstance(text, str) and " " not in text} | imports(path)
        if any(name == "tests" or name.startswith("tests.") for name in named):
            users.add(path.relative_to(ROOT).parts[:2])
    assert users == {("vswin_dist", "benchmarks")}


def test_data_prep_needs_no_torch() -> None:
    for path in sources("data_prep"):
        names = imports(path)
        assert not {n.split(".")[0] for n in names} & {"torch", "deepspeed", "mlflow"}, path
        assert {n.split(".")[1] for n in names if n.startswith("vswin_dist.")} <= {
            "errors",
            "local_files",
            "pages",
            "charts",
            "pictures",
            "storage",
            "video",
            "records",
            "columns",
            "lease",
            "manifest",
        }, path


@pytest.mark.slow
@pytest.mark.parametrize("package", HOMES)
def test_heavy_packages_have_one_home(package: str) -> None:
    users = {
        str(p.relative_to(ROOT))
        for p in sources("vswin_dist")
        if any(n == package or n.startswith(f"{package}.") for n in imports(p))
    }
    assert users <= HOMES[package]


def test_data_prep_loads_no_torch() -> None:
    code = "import sys, data_prep.pipeline, data_prep.report; print([m for m in ('torch', 'mlflow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_look_at_a_node_loads_nothing_heavy() -> None:
    code = "import sys, vswin_dist.training.node_facts; print([m for m in ('torch', 'mlflow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_importing_is_cheap() -> None:
    code = "import sys, vswin_dist; print([m for m in ('torch', 'ray', 'av', 'mlflow', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.slow
def test_a_rank_loads_mlflow_only_to_log() -> None:
    code = """
import sys, torch
from vswin_dist.training import deepspeed_setup, trainer
deepspeed_setup.import_deepspeed(torch.device("cpu"))
print("mlflow" in sys.modules)
import mlflow
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.slow
def test_a_driver_and_a_rank_load_no_compiler(tmp_path: Path) -> None:
    """It takes seconds in each of their processes. The driver looks at weights of images without taking them."""
    code = f"""
import sys, torch
from vswin_dist.models import build_model, export_state, load_pretrained
from vswin_dist.training import deepspeed_setup, engine, launch
image = build_model("swin_nano", num_classes=5, patch_size=(1, 4, 4), window_size=(1, 4, 4))
torch.save(export_state(image, "microsoft2d"), "{tmp_path}/image.pth")
with torch.device("meta"):
    video = build_model("swin_nano", num_classes=5)
load_pretrained(video, "{tmp_path}/image.pth", dry_run=True)
deepspeed_setup.import_deepspeed(torch.device("cpu"))
weight = torch.nn.Parameter(torch.zeros(2))
weight.grad = torch.ones(2)
engine.EngineAdamW([weight], lr=0.1).step()
print([m for m in ("torch._dynamo", "torch._inductor") if m in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.endswith("[]\n")


def test_jobs_are_short() -> None:
    for path in sources("jobs"):
        assert len(path.read_text().splitlines()) <= 60, path


def test_a_newcomers_path_is_short() -> None:
    parts = ["jobs/train.py", "vswin_dist/training/launch.py", "vswin_dist/training/trainer.py"]
    assert sum(len((ROOT / p).read_text().splitlines()) for p in parts) < 600


def functions() -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function of the project but the Triton kernels, whose tensors and strides are parameters."""
    found = []
    for path in [p for package in ("vswin_dist", "data_prep", "jobs", "infra") for p in sources(package)]:
        if path.name != "triton_kernels.py":
            nodes = ast.walk(ast.parse(path.read_text()))
            found += [(f"{path}:{n.name}", n) for n in nodes if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return found


@pytest.mark.slow
def test_functions_are_short() -> None:
    lengths = {name: (node.end_lineno or 0) - node.lineno + 1 for name, node in functions()}
    assert {name: lines for name, lines in lengths.items() if lines > 60} == {}


@pytest.mark.slow
def test_functions_have_few_parameters() -> None:
    counts = {name: len([*node.args.args, *node.args.kwonlyargs]) for name, node in functions()}
    assert {name: count for name, count in counts.items() if count > 9} == {}, "8, and self"
