"""Speed and memory of a model beside its peers: in one process, runs alternating, medians.

Peers are taken where they can be imported: torchvision's swin3d at the same dimensions, and the plain reference
of `tests/parity` when run from the repository. Prints one table and one JSON; `python jobs/benchmark.py model` is
the same as `python -m vswin_dist.benchmarks.model`:

    swin_t --threads 2                                      the speed of a preset
    swin_t --set window_size=[16,7,7] --set shift=none      of any variant
    swin_b --clip 16 224 224 --no-peers --also gradient_checkpointing=block --also gradient_checkpointing=stage
                                                            one more row of ours for each --also
    --gpu-claims                                            everything that this model claims of a GPU, in one command
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from vswin_dist.errors import ConfigError
from vswin_dist.models.kernels.dispatch import Linear
from vswin_dist.models.swin.counting import count_macs
from vswin_dist.models.swin.model import VideoSwin, build_model
from vswin_dist.models.weights.layouts import export_state

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
COLUMNS = {  # heading -> key of a row, its unit and its format
    "forward s": ("forward_s", 1, ".3f"),
    "forward+backward s": ("step_s", 1, ".3f"),
    "clips/s": ("clips_per_s", 1, ".2f"),
    "utilisation": ("utilisation", 1, ".0%"),
    "peak GB": ("peak_bytes", 1e9, ".2f"),
    "speed-up": ("forward_speedup_of_ours", 1, ".2f"),
    "f+b speed-up": ("step_speedup_of_ours", 1, ".2f"),
}


def peers(model: VideoSwin) -> dict[str, nn.Module]:
    """Build the importable models of the same dimensions and weights; drop path and dropout are off in all of them."""
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
            patch_size=list(a.patch_size),
            embed_dim=a.embed_dim,
            depths=list(a.depths),
            num_heads=list(a.num_heads),
            window_size=list(a.window_size),
            stochastic_depth_prob=0.0,
            num_classes=a.num_classes,
        )
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
    also: Sequence[dict[str, Any]] = (),
    **overrides: Any,
) -> dict[str, Any]:
    """Measure a preset with overrides; `clip` is (T, H, W) in frames and pixels, times are in seconds.

    `also` lists further overrides, each of which makes one more model of ours in the same run. Returns a JSON-able
    dict: where it ran, the device's measured matrix rate, and a row per model with medians, every single time, clips
    per second of training, utilisation (operations of forward and backward, three times the forward's, per second
    over the matrix rate) and the peak memory of one training step. A model that does not fit a GPU has None there.

    Raises:
        ConfigError: a dtype, device or override that cannot be.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    target = _target(device)
    base = {"drop_path_rate": 0.0, "head_dropout": 0.0, **overrides}
    settings = {name: base} | {" ".join([name, *(f"{k}={v}" for k, v in more.items())]): base | more for more in also}
    models: dict[str, nn.Module] = {key: build_model(name, **own) for key, own in settings.items()}
    ours = models[name]
    assert isinstance(ours, VideoSwin)
    models |= peers(ours) if with_peers else {}
    for model in models.values():
        model.to(target, DTYPES[dtype])
    clips = torch.randn(batch, 3, *clip, device=target, dtype=DTYPES[dtype])
    rate = matrix_rate(target, DTYPES[dtype])
    forward = _alternate({n: partial(_forward, m, clips) for n, m in models.items()}, repeats, target)
    step = _alternate({n: partial(_step, m, clips) for n, m in models.items()}, repeats, target)
    operations = 6 * batch * count_macs(ours, clip)
    what = {"name": name, "clip": list(clip), "batch": batch, "dtype": dtype}
    rows = []
    for key, model in models.items():
        f, s = _median(forward[key]), _median(step[key])
        spec = {**what, "peer": None if key in settings else key, "settings": settings.get(key, base)}
        rows.append(
            {
                "model": key,
                "forward_s": f,
                "step_s": s,
                "clips_per_s": s and batch / s,
                "peak_bytes": None if s is None else _cuda_peak(model, clips) if clips.is_cuda else cpu_peak(spec),
                "utilisation": s and operations / s / rate,
                "forward_speedup_of_ours": _ratio(f, _median(forward[name])),
                "step_speedup_of_ours": _ratio(s, _median(step[name])),
                "forward_runs_s": forward[key],
                "step_runs_s": step[key],
            }
        )
    where = {"device": _device(target), "threads": torch.get_num_threads(), "torch": torch.__version__}
    return {**what, "overrides": overrides, **where, "matrix_flops": rate, "rows": rows}


def _target(device: str) -> torch.device:
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device={device!r}: say cpu or cuda") from error
    if target.type not in ("cpu", "cuda") or (target.type == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"device={device!r}: this machine or this build of torch has none; cpu is there")
    return target


def gpu_claims(result: dict[str, Any]) -> str:
    """Say what a run with a checkpointed row shows of the claims for a GPU, one line each; wanted values beside."""
    rows = {row["model"]: row for row in result["rows"]}
    peer = rows.get("torchvision", {"step_s": None, "peak_bytes": None})
    ours = [row for key, row in rows.items() if key not in ("torchvision", "reference") and row["step_s"]]
    saving = [row["peak_bytes"] for row in ours if "gradient_checkpointing" in row["model"]]
    fastest = min((row["step_s"] for row in ours), default=None)
    utilisation = max((row["utilisation"] for row in ours), default=None)
    memory = _ratio(min(saving, default=None), peer["peak_bytes"])
    found = [
        ("forward+backward over torchvision's", _ratio(peer["step_s"], fastest), "at least 2"),
        ("utilisation of the matrix rate", utilisation, "at least 0.45"),
        ("peak memory, checkpointed, over torchvision's without", memory, "at most 0.5"),
    ]
    lines = [
        f"{what}: {'not measured' if value is None else f'{value:.2f}'} (wanted: {wanted})" for what, value, wanted in found
    ]
    return "\n".join([*lines, _fastest_kernel(ours)])


def _fastest_kernel(rows: Sequence[dict[str, Any]]) -> str:
    """One line: the attention kernel of the fastest training step, beside the fastest of the other."""
    best: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: float(row["step_s"])):
        best.setdefault("plain" if "attention_kernel=plain" in row["model"] else "triton", row)
    if len(best) < 2:
        return "fastest attention kernel: not measured"
    (name, row), (other, slower) = best.items()
    return f"fastest attention kernel: {name}, {slower['step_s'] / row['step_s']:.2f} times {other} (in {row['model']!r})"


def _median(times: list[float]) -> float | None:
    return median(times) if times else None


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the floating-point operations per second of a large matrix product: best of five, on the model's path."""
    side = 8192 if device.type == "cuda" else 2048
    layer = Linear(side, side, bias=False).to(device, dtype)
    x = torch.randn(side, side, device=device, dtype=dtype)
    with torch.no_grad():
        times = _alternate({"product": lambda: layer(x)}, 5, device)["product"]
    return float(2 * side**3 / min(times))


def table(result: dict[str, Any]) -> str:
    """Write the result of `benchmark` as text."""
    lines = [["model", *COLUMNS]]
    for row in result["rows"]:
        values = [(row[key], unit, form) for key, unit, form in COLUMNS.values()]
        lines.append([row["model"], *("no memory" if v is None else format(v / unit, form) for v, unit, form in values)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
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
    model(clips).float().square().sum().backward()
    model.zero_grad(set_to_none=True)  # what one model holds must not count for the others


def _alternate(runs: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Time each run in seconds, taking turns, after one unmeasured turn; none for a run that does not fit the GPU."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    runs = dict(runs)
    for turn in range(repeats + 1):
        for name in list(runs):
            _wait(device)
            start = time.perf_counter()
            try:
                runs[name]()
                _wait(device)
            except torch.OutOfMemoryError:
                del runs[name]
                times[name] = []
                torch.cuda.empty_cache()
                continue
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"


def _cuda_peak(model: nn.Module, clips: Tensor) -> int:
    """Measure the bytes that one training step adds to what was held before it, at its peak."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _step(model, clips)
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def cpu_peak(spec: dict[str, Any]) -> int:
    """Measure the bytes of resident memory that one training step adds, at its peak, in a fresh process.

    There, freed memory goes back to the system at once, so that the peak is that of what is in use.
    """
    command = [sys.executable, "-m", "vswin_dist.benchmarks.model", "--measure-step", json.dumps(spec)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 20),
    }
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"the process that measures memory failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def _measure_step(spec: dict[str, Any]) -> int:
    ours = build_model(spec["name"], **spec["settings"])
    model = ours if spec["peer"] is None else peers(ours)[spec["peer"]]
    model.to(DTYPES[spec["dtype"]])
    clips = torch.randn(spec["batch"], 3, *spec["clip"], dtype=DTYPES[spec["dtype"]])
    _step(model, clips[:1, :, :2, :16, :16])  # what is loaded and compiled at first use must not count for the step
    before = _resident("VmRSS")
    _step(model, clips)
    return _resident("VmHWM") - before


def _resident(what: str) -> int:
    """Read the bytes resident in this process now (VmRSS) or at their peak (VmHWM); the peak where there is no such file.

    On Linux, ru_maxrss would not do: a process inherits it from the one that started it.
    """
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(what))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _settings(pairs: list[str]) -> dict[str, Any]:
    """Read `key=value` pairs, the values as JSON or, where they are not JSON, as text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"{pair!r} is not a setting: write key=value")
        try:
            found[key] = json.loads(text)
        except json.JSONDecodeError:
            found[key] = text
    return found


GPU_CLAIMS: dict[str, Any] = {"name": "swin_l", "batch": 8, "dtype": "bfloat16", "device": "cuda"}
GPU_VARIANTS: tuple[list[str], ...] = (
    [],
    ["gradient_checkpointing=block"],
    ["gradient_checkpointing=selective"],
    ["compile=true"],
    ["compile=true", "gradient_checkpointing=block"],
)
GPU_ROWS = (*GPU_VARIANTS[1:], *(["attention_kernel=plain", *variant] for variant in GPU_VARIANTS))


def main(arguments: list[str] | None = None) -> int:
    """Run the command: print the table, then the JSON."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", help="preset; swin_t by default")
    parser.add_argument("--clip", type=int, nargs=3, default=(32, 224, 224), metavar=("T", "H", "W"))
    parser.add_argument("--batch", type=int)
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--device", help="cpu by default")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of build_model")
    parser.add_argument("--also", action="append", nargs="+", default=[], metavar="KEY=VALUE", help="one more row of ours")
    parser.add_argument("--gpu-claims", action="store_true", help="by default swin_l, batch 8, bfloat16 on cuda")
    parser.add_argument("--measure-step", metavar="JSON", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.measure_step:
        print(_measure_step(json.loads(args.measure_step)))
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    given = {key: value for key in ("name", "batch", "dtype", "device") if (value := getattr(args, key)) is not None}
    also = [*(GPU_ROWS if args.gpu_claims else ()), *args.also]
    result = benchmark(
        **(GPU_CLAIMS if args.gpu_claims else {}) | given,
        clip=tuple(args.clip),
        repeats=args.repeats,
        with_peers=not args.no_peers,
        also=[_settings(pairs) for pairs in also],
        **_settings(args.set),
    )
    print(table(result))
    if args.gpu_claims:
        print(gpu_claims(result))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
