"""What is measured of a training's time: parts of steps, utilisation, traces."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.clock import Clock
from vswin_dist.config import load_settings
from vswin_dist.device import Rank
from vswin_dist.errors import ConfigError
from vswin_dist.models import build_model
from vswin_dist.tracking import NullRun
from vswin_dist.training import step_timer
from vswin_dist.training.profiler import StepProfiler, steps_of
from vswin_dist.training.step_timer import StepTimer, timed, times
from vswin_dist.training.utilisation import Utilisation, step_flops


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(step_timer, "time", clock)
    return clock


class Log(NullRun):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, Any]] = []
        self.files: list[str] = []

    def log(self, step: int, metrics: Any) -> None:
        self.rows.append((step, metrics))

    def artifact_file(self, path: str, local: Path) -> None:
        self.files.append(f"{path} {local.stat().st_size > 0}")


def test_parts_are_timed_and_the_heartbeat_is_told(clock: Clock) -> None:
    timer = StepTimer()
    for part, seconds in (("data", 1.0), ("forward", 2.0), ("data", 4.0)):
        with timer(part, 3):  # type: ignore[arg-type]
            assert (timer.heartbeat.last.phase, timer.heartbeat.last.step) == (part, 3)
            clock.now += seconds
        clock.now += 100
    taken = timer.take()
    assert taken == {"data": 5.0, "forward": 2.0} and timer.take() == {}
    assert times(taken, 2) == {"time/data_s": 2.5, "time/forward_s": 1.0}


def test_a_timed_method_logs_how_long_it_took(clock: Clock) -> None:
    class Trains:
        timer, tracking = StepTimer(), Log()

        @timed("evaluation")
        def evaluate(self, done: int, more: str) -> str:
            clock.now += 7
            return f"{done} {more}"

    trainer = Trains()
    assert trainer.evaluate(4, "x") == "4 x"
    assert trainer.tracking.rows == [(4, {"time/evaluation_s": 7.0})]


def test_a_step_counts_what_the_paper_counts() -> None:
    """Table 1: 88 GFLOPs (multiply-accumulates) of Swin-T on 32 x 224 x 224; a backward pass costs twice a forward one."""
    with torch.device("meta"):
        model = build_model("swin_t", num_classes=400)
    s = load_settings("k400_swin_l", ["run.name=x", "data.train=/none", "data.frames=32", "data.size=224"])
    assert step_flops(model, s) / s.training.global_batch == pytest.approx(2 * 3 * 88e9, rel=0.01)


@pytest.mark.parametrize(
    ("name", "precision", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "bf16", 989),
        ("NVIDIA H20", "bf16", 0),
        ("NVIDIA A100-SXM4-80GB", "fp32", 0),
        ("Tesla V100-SXM2-16GB", "bf16", 0),
    ],
)
def test_peaks_go_by_the_name_of_the_device(
    name: str, precision: str, teraflops: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    with torch.device("meta"):
        model = build_model("swin_nano")
    s = load_settings("demo", ["run.name=x", "data.train=/none", f"training.precision={precision}"])
    assert Utilisation.of(model, s, Rank(0, 2, torch.device("cuda"))).peak == 2 * teraflops * 1e12
    assert Utilisation.of(model, s, Rank(0, 2, torch.device("cpu"))).peak == 0


def test_utilisation_is_told_where_the_peak_is_known() -> None:
    assert Utilisation(6.0, 4.0).metrics(3.0) == {"train/mfu": 0.5}
    assert Utilisation().metrics(3.0) == {}


def test_a_trace_holds_the_steps_that_were_asked_for(tmp_path: Path) -> None:
    run = Log()
    profiler = StepProfiler(steps_of("2..9", last_step=3), str(tmp_path), run)
    for step, work in enumerate([torch.sin, torch.cos, torch.tan, torch.exp], 1):
        with profiler(step):
            work(torch.ones(3))
    [trace] = (tmp_path / "profile").iterdir()
    names = {event["name"] for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert {"aten::cos", "aten::tan"} <= names and not {"aten::sin", "aten::exp"} & names
    assert trace.name == "steps-2-3.json.gz" and run.files == ["profile/steps-2-3.json.gz True"]


def test_nothing_is_traced_unasked(tmp_path: Path) -> None:
    with StepProfiler(steps_of(None, 9), str(tmp_path))(1):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["3..2", "0..2", "5", "a..b", "1-2"])
def test_a_range_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"training.profile=.*FIRST\.\.LAST"):
        load_settings("demo", ["run.name=x", "data.train=/none", f"training.profile={text}"])
