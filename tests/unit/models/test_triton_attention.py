"""The Triton kernels give what the plain path gives, forward and backward, and compile for GPUs.

There need be no GPU: Triton's interpreter computes them in a process of its own, since it must be chosen before Triton is
imported. It multiplies no bfloat16 (Triton 3.7), so that half precision is float16 here; tests/gpu has the other.
"""

from __future__ import annotations

import importlib.util
import math
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vswin_dist.errors import ConfigError
from vswin_dist.models import VideoSwin, build_model
from vswin_dist.models.kernels import dispatch
from vswin_dist.models.stochastic import sample_keys
from vswin_dist.models.swin import model as swin_model
from vswin_dist.models.swin.windows import batch_geometry

CPU = torch.device("cpu")
TINY = {"embed_dim": 12, "depths": (2,), "num_heads": (2,), "window_size": (2, 4, 4), "num_classes": 5}
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed")


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            assert pool.submit(os.getenv, "TRITON_INTERPRET").result() == "1"  # the process has started
        yield pool


def gradients(qkv: Tensor, table: Tensor, grad: Tensor, geometry: tuple, kernel: str) -> tuple[Tensor, ...]:
    """Output, and the gradients of the projection and the bias table, for an upstream gradient."""
    qkv, table = qkv.clone().requires_grad_(), table.clone().requires_grad_()
    made = batch_geometry(*geometry, CPU, table.dtype)
    out = dispatch.window_attention(qkv, dispatch.window_bias(table, made, kernel), table.shape[1], made, kernel)
    out.backward(grad)
    assert qkv.grad is not None and table.grad is not None
    return out.detach(), qkv.grad, table.grad


def compare(geometry: tuple, patterns: int, heads: int, width: int, dtype: torch.dtype, programs: int) -> None:
    """The kernels against the plain path in float64, for random numbers; `programs` decides the splits of the windows."""
    from vswin_dist.models.kernels import triton_attention

    triton_attention.PROGRAMS = programs
    made = batch_geometry(*geometry, CPU, dtype)
    assert len(made.rows) == patterns
    windows, rows = len(made.gather) // made.length, math.prod(2 * w - 1 for w in geometry[1])
    rng = torch.Generator().manual_seed(0)
    shapes = (windows, made.length, 3 * heads * width), (rows, heads), (windows, made.length, heads * width)
    inputs = [torch.randn(shape, generator=rng).to(dtype) for shape in shapes]
    found = gradients(*inputs, geometry, "triton")
    wanted = gradients(*(x.double() for x in inputs), geometry, "plain")
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 1e-2}
    for name, a, b in zip(("out", "qkv", "table"), found, wanted, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, **close, msg=lambda text, name=name: f"{name}: {text}")


CASES = {  # grid, window, shift, indexing, clips; patterns, heads, channels of a head, dtype, programs of the bias gradient
    "one pattern": (((4, 4, 4), (4, 4, 4), (0, 0, 0), "offset", 2), 1, 3, 16, torch.float32, 1024),
    "eight patterns, uneven splits": (((4, 6, 6), (2, 3, 3), (1, 1, 1), "offset", 2), 8, 2, 16, torch.float32, 12),
    "padding, padded channels": (((3, 5, 7), (2, 3, 3), (1, 1, 1), "offset", 1), 8, 2, 6, torch.float32, 1024),
    "clamped in time and height": (((2, 3, 8), (8, 7, 7), (4, 3, 3), "offset", 1), 2, 2, 20, torch.float32, 1024),
    "several tiles, the last in part": (((2, 14, 7), (8, 7, 7), (4, 3, 3), "offset", 1), 2, 1, 32, torch.float32, 1024),
    "float16": (((4, 6, 6), (2, 3, 3), (1, 1, 1), "offset", 1), 8, 2, 32, torch.float16, 1),
}


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_those_of_the_plain_path(case: str, interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(compare, *CASES[case]).result()


COMPILED = pytest.param("block", True, marks=pytest.mark.slow)


def compare_models(mode: str, compile: bool) -> None:
    """Logits and the gradients of all parameters of two models; the graph of the compiled one serves a second step."""
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: list) -> object:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    captured = torch.compile(VideoSwin._compute, dynamic=False, fullgraph=True, backend=count)
    swin_model._compiled = lambda: captured
    plain = build_model("swin_t", **TINY, drop_path_rate=0.5)
    model = build_model(
        "swin_t", **TINY, drop_path_rate=0.5, gradient_checkpointing=mode, compile=compile, attention_kernel="triton"
    )
    model.load_state_dict(plain.state_dict())
    for step in range(1 + compile):
        clips = torch.randn(2, 3, 4, 24, 20, generator=torch.Generator().manual_seed(step))
        keys = sample_keys(0, step, torch.tensor([5, 9]))
        logits = []
        for each in (plain, model):
            each.zero_grad()
            logits.append(each(clips, keys))
            logits[-1].square().sum().backward()
        torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-6)
        for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert graphs == compile
    torch.testing.assert_close(model.eval()(clips), plain.eval()(clips), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(("mode", "compile"), [("none", False), ("selective", False), COMPILED])
def test_a_model_learns_the_same(mode: str, compile: bool, interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(compare_models, mode, compile).result()


def test_the_kernel_belongs_to_the_device_and_not_to_the_model() -> None:
    assert "attention_kernel" not in build_model("swin_nano", attention_kernel="triton").settings


def test_refused_where_it_cannot_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="not on cpu: take attention_kernel=auto"):
        build_model("swin_t", **TINY, attention_kernel="triton")(torch.zeros(1, 3, 4, 24, 20))
    monkeypatch.setitem(sys.modules, "vswin_dist.models.kernels.triton_attention", None)
    with pytest.raises(ConfigError, match="needs the package triton"):
        dispatch.check_kernel("triton", torch.device("cuda"), torch.bfloat16)


@needs_triton
def test_float64_is_refused() -> None:
    with pytest.raises(ConfigError, match="not in float64"):
        dispatch.check_kernel("triton", torch.device("cuda"), torch.float64)


def compiled(name: str, capability: int) -> bytes:
    """Machine code of a kernel for Swin's windows of 8 x 7 x 7 in bfloat16."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vswin_dist.models.kernels import triton_attention, triton_kernels

    kernel = getattr(triton_kernels, name)
    windows = torch.empty(64, 392, 3 * 192, dtype=torch.bfloat16, device="meta")
    constants = triton_attention._constants(name, windows, torch.zeros(8, 392, 16), heads=6)
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages")}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names and key != "scale"}
    types = {
        "scale": "fp32",
        "windows": "i32",
        "per_split": "i32",
        "pattern": "*i32",
        "norm": "*fp32",
        "delta": "*fp32",
        "partial": "*fp32",
    }
    signature = {a: "constexpr" if a in constants else types.get(a, "*bf16") for a in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names) if signature[a].startswith("*")}
    source = ASTSource(kernel, signature, constants, aligned)
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"]


@pytest.mark.slow
@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["forward", "backward_queries", "backward_keys", "backward_bias"])
def test_compiles_without_spilling_registers(
    name: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    code = tmp_path / "kernel.cubin"
    code.write_bytes(compiled(name, capability))
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", code], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    assert stack == 0, usage
    assert registers < 255
