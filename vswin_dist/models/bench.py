"""Speed and memory of a model beside its peers, in one process, runs alternating, medians.

Peers are taken where they can be imported: torchvision's swin3d at the same dimensions, and the plain reference
of ``tests/parity`` when run from the repository. ``python -m vswin_dist.models.bench swin_t --threads 2`` prints
one table and one JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from vswin_dist.errors import ConfigError

from .counting import count_macs
from .layouts import export_state
from .ops import Linear
from .swin3d import VideoSwin, build_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
COLUMNS = ("model", "forward s", "forward+backward s", "clips/s", "utilisation", "peak GB", "speed-up", "f+b speed-up")


def peers(model: VideoSwin) -> dict[str, nn.Module]:
    """Importable models of the same dimensions and weights; drop path and dropout are off in all of them."""
    found: dict[str, nn.Module] = {}
    a = model.architecture
    if a.attention_design != "joint" or a.shift != "3d":
        return found
    try:
        swin = importlib.import_module("torchvision.models.video.swin_transformer")
    except (ImportError, RuntimeError):  # RuntimeError: a torchvision built for another torch
        swin = None
    if swin is not None:
        found["torchvision"] = swin.SwinTransformer3d(
            patch_size=list(a.patch_size), embed_dim=a.embed_dim, depths=list(a.depths), num_heads=list(a.num_heads),
            window_size=list(a.window_size), stochastic_depth_prob=0.0, num_classes=a.num_classes,
        )  # fmt: skip
        found["torchvision"].load_state_dict(export_state(model, "torchvision"))
    try:
        plain = importlib.import_module("tests.parity.reference_swin")
    except ImportError:
        return found
    found["reference"] = plain.ReferenceSwin(model.settings)
    found["reference"].load_state_dict(model.state_dict())
    return found


def benchmark(
    name: str = "swin_t",
    *,
    clip: tuple[int, int, int] = (32, 224, 224),
    batch: int = 1,
    dtype: str = "float32",
    device: str = "cpu",
    repeats: int = 5,
    with_peers: bool = True,
    **overrides: Any,
) -> dict[str, Any]:
    """Measure a preset with overrides; ``clip`` is (T, H, W) in frames and pixels. Times are in seconds.

    Returns a JSON-able dict: where it ran, the device's measured matrix rate, and a row per model with medians,
    every single time, clips per second of training, utilisation (operations of forward and backward, three
    times the forward's, per second over the matrix rate) and the peak memory of one training step.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    place = torch.device(device)
    settings = {"drop_path_rate": 0.0, "head_dropout": 0.0, **overrides}
    ours = build_model(name, **settings)
    models: dict[str, nn.Module] = {name: ours, **(peers(ours) if with_peers else {})}
    for model in models.values():
        model.to(place, DTYPES[dtype])
    clips = torch.randn(batch, 3, *clip, device=place, dtype=DTYPES[dtype])
    rate = matrix_rate(place, DTYPES[dtype])
    forward = _alternate({n: partial(_forward, m, clips) for n, m in models.items()}, repeats, place)
    step = _alternate({n: partial(_step, m, clips) for n, m in models.items()}, repeats, place)
    operations = 6 * batch * count_macs(ours, clip)
    rows = []
    for key, model in models.items():
        spec = {"name": name, "peer": key, "clip": clip, "batch": batch, "dtype": dtype, "settings": settings}
        peak = _cuda_peak(model, clips) if place.type == "cuda" else cpu_peak(spec)
        f, s = median(forward[key]), median(step[key])
        rows.append({
            "model": key, "forward_s": f, "step_s": s, "clips_per_s": batch / s, "utilisation": operations / s / rate,
            "peak_bytes": peak, "forward_speedup_of_ours": f / median(forward[name]),
            "step_speedup_of_ours": s / median(step[name]), "forward_runs_s": forward[key], "step_runs_s": step[key],
        })  # fmt: skip
    return {
        "name": name, "overrides": overrides, "clip": list(clip), "batch": batch, "dtype": dtype, "device": _device(place),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "matrix_flops": rate, "rows": rows,
    }  # fmt: skip


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product, best of five, on the path the model takes."""
    side = 8192 if device.type == "cuda" else 2048
    layer = Linear(side, side, bias=False).to(device, dtype)
    x = torch.randn(side, side, device=device, dtype=dtype)
    with torch.no_grad():
        times = _alternate({"product": lambda: layer(x)}, 5, device)["product"]
    return float(2 * side**3 / min(times))


def table(result: dict[str, Any]) -> str:
    """The result of `benchmark` as text."""
    lines = [COLUMNS]
    for r in result["rows"]:
        lines.append((
            r["model"], f"{r['forward_s']:.3f}", f"{r['step_s']:.3f}", f"{r['clips_per_s']:.2f}",
            f"{r['utilisation']:.0%}", f"{r['peak_bytes'] / 1e9:.2f}", f"{r['forward_speedup_of_ours']:.2f}",
            f"{r['step_speedup_of_ours']:.2f}",
        ))  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    head = (
        f"{result['name']} {'x'.join(map(str, result['clip']))}, batch {result['batch']}, {result['dtype']}, "
        f"{result['device']}, {result['threads']} threads, {result['matrix_flops'] / 1e12:.2f} TFLOP/s of matrix rate"
    )
    return "\n".join([head, *("  ".join(c.rjust(w) for c, w in zip(x, widths, strict=True)) for x in lines)])


def _forward(model: nn.Module, clips: Tensor) -> None:
    model.eval()
    with torch.no_grad():
        model(clips)


def _step(model: nn.Module, clips: Tensor) -> None:
    model.train()
    model.zero_grad(set_to_none=True)
    model(clips).float().square().sum().backward()


def _alternate(runs: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each run, taking turns, after one unmeasured turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"


def _cuda_peak(model: nn.Module, clips: Tensor) -> int:
    """Bytes that one training step adds to what was held before it, at its peak."""
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _step(model, clips)
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def cpu_peak(spec: dict[str, Any]) -> int:
    """Bytes of resident memory that one training step adds, at its peak, in a fresh process."""
    command = [sys.executable, "-m", "vswin_dist.models.bench", "--measure-step", json.dumps(spec)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the process that measures memory failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def _measure_step(spec: dict[str, Any]) -> int:
    ours = build_model(spec["name"], **spec["settings"])
    model = ours if spec["peer"] == spec["name"] else peers(ours)[spec["peer"]]
    model.to(DTYPES[spec["dtype"]])
    clips = torch.randn(spec["batch"], 3, *spec["clip"], dtype=DTYPES[spec["dtype"]])
    before = _resident()
    _step(model, clips)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before


def _resident() -> int:
    """Bytes of this process now; its peak so far where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(arguments: list[str] | None = None) -> int:
    """Command line: print the table, then the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="?", default="swin_t")
    parser.add_argument("--clip", type=int, nargs=3, default=(32, 224, 224), metavar=("T", "H", "W"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--gradient-checkpointing", default="none")
    parser.add_argument("--measure-step", metavar="JSON", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.measure_step:
        print(_measure_step(json.loads(args.measure_step)))
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    result = benchmark(
        args.name, clip=tuple(args.clip), batch=args.batch, dtype=args.dtype, device=args.device, repeats=args.repeats,
        with_peers=not args.no_peers, gradient_checkpointing=args.gradient_checkpointing,
    )  # fmt: skip
    print(table(result))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
