"""The capacity plan: its arithmetic, and that every recipe gets one."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vswin_dist.config import load_settings, recipe_names, recipe_text
from vswin_dist.errors import ConfigError
from vswin_dist.manifest import read_manifest
from vswin_dist.planning.hardware import GPUS, SOURCES, Coefficients
from vswin_dist.planning.plan import CapacityPlan
from vswin_dist.planning.throughput import Work, at_fixed_batch, collective, micro_batch_time, step_time

GPU, C = GPUS["h200-141"], Coefficients()
SWIN_L = Work(
    603_000_000_000, blocks=24, width=192, parameters=197_000_000, element=2, recomputed=0.0, micro_batch=8, zero_stage=2
)


def test_the_step_that_was_measured() -> None:
    assert micro_batch_time(SWIN_L, GPU, C) == pytest.approx(0.117, rel=0.02)
    checkpointed = Work(**{**SWIN_L.__dict__, "recomputed": 1.0})
    assert micro_batch_time(checkpointed, GPU, C) == pytest.approx(0.160, rel=0.05)
    swin_t = Work(88e9, blocks=12, width=96, parameters=28e6, element=2, recomputed=0.0, micro_batch=16, zero_stage=1)  # type: ignore[arg-type]
    assert micro_batch_time(swin_t, GPU, C) == pytest.approx(0.085, rel=0.1)  # 85 to 90 ms in three trainings


def test_collectives_by_hand() -> None:
    assert collective(1e9, 1, GPU, C) == 0
    inside = 2 * 7 / 8 * 1e9 / 450e9  # a ring over the links of a node
    assert collective(1e9, 8, GPU, C) == pytest.approx(inside)
    between = 2 * 15 / 16 * 1e9 / (8 * 50e9) + 2 * 1 * 15e-6  # bound by eight interfaces; one hop there, one back
    assert collective(1e9, 16, GPU, C) == pytest.approx(between)
    assert collective(1e9, 16, GPU, C, passes=1) == pytest.approx(between / 2)


def test_one_gpu_communicates_nothing_and_zero_3_most() -> None:
    assert step_time(SWIN_L, 1, 1, GPU, C).communication == 0
    slow = Coefficients(network=1e8)
    two, three = (step_time(Work(**{**SWIN_L.__dict__, "zero_stage": s}), 64, 1, GPU, slow) for s in (2, 3))
    assert three.communication > two.communication > 0


def test_a_fixed_batch_ends_where_it_does_not_divide() -> None:
    few, many = at_fixed_batch(SWIN_L, 64, 4, GPU, C), at_fixed_batch(SWIN_L, 64, 64, GPU, C)
    assert few and (few.accumulation, few.global_batch) == (2, 64)
    assert many and many.accumulation == 1 and many.clips_per_second < 16 * few.clips_per_second
    assert at_fixed_batch(SWIN_L, 64, 48, GPU, C) is None and at_fixed_batch(SWIN_L, 64, 128, GPU, C) is None


def test_every_coefficient_says_where_it_is_from() -> None:
    assert set(SOURCES) == set(Coefficients.__dataclass_fields__)
    assert all(text.startswith(("measured", "assumed")) for text in SOURCES.values())


def plan(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["planning", *arguments])
    import vswin_dist.planning

    return runpy.run_path(str(Path(vswin_dist.planning.__file__).with_name("__main__.py")))["main"]()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_has_a_plan(recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(monkeypatch, "--recipe", recipe, "--gpus", "8") == 0
    output = capsys.readouterr().out
    assert "Memory of a GPU" in output and "| 4,096 |" in output and "Taken for granted" in output


def test_the_picture_and_the_size_of_a_real_set(
    motion_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "plan.png"
    asked = ("--recipe", "demo", "--gpus", "4", "--gpu", "a100-80", "--picture", str(picture))
    assert plan(monkeypatch, *asked, f"data.train={motion_shards}/train") == 0
    output = capsys.readouterr()
    assert "epochs of 52 videos on a100-80" in output.out and "Kinetics" not in output.err
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_recipes_own_set_is_planned_for_and_what_is_taken_of_it(
    motion_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, manifest = tmp_path / "own.yaml", read_manifest(f"{motion_shards}/train")
    recipe.write_text(f"{recipe_text('demo')}\ndata.train: {motion_shards}/train\n")
    own = np.bincount(manifest.samples.numbers("class_id"))
    half, first = sum(max(1, round(0.5 * int(n))) for n in own), manifest.classes[0]
    for name, given, videos in (
        (str(recipe), [], "52"),
        (str(recipe), ["data.subset=0.5", "training.max_steps=3"], f"{half}"),
        (str(recipe), [f"data.classes=[{first}]"], f"{own[0]}"),
        (str(recipe), ["--samples", "1000", "data.subset=0.5"], "500"),
        ("demo", ["data.subset=0.25"], "60,109"),
    ):
        assert plan(monkeypatch, "--recipe", name, "--gpus", "1", *given) == 0
        steps = ", at most 3 steps" if "training.max_steps=3" in given else ""
        assert f"epochs of {videos} videos on h100-80{steps}\n" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"data\.train is empty"):
        plan(monkeypatch, "--recipe", str(recipe), "data.train=")


def test_hours_are_those_of_what_is_trained() -> None:
    def hours(*settings: str) -> list[float]:
        """With the recipe's batch, and with one micro-batch of 8 clips."""
        s = load_settings("demo", ["data.train=any", "training.micro_batch=8", "training.epochs=100000", *settings])
        plan = replace(made, settings=s)
        rows = [plan.row(plan.fixed()[0], False), plan.row(plan.grown()[0], True)]
        return [float(row.split("|")[-2].strip(" *").replace(",", "")) for row in rows]

    made = CapacityPlan.make(load_settings("demo", ["data.train=any"]), "h100-80", 1, 240_436, 400, C)
    fixed, grown = hours()
    assert fixed > 1000 and grown > 1000
    assert hours("data.repeats=2") == pytest.approx([fixed * 2, grown * 2], abs=2)
    batch = made.settings.training.global_batch
    steps = 100_000 * 240_436 // (2 * batch)  # half of them with the recipe's batch
    assert hours(f"training.max_steps={steps}") == pytest.approx([fixed / 2, grown / 2 * 8 / batch], abs=1)
    assert hours("training.max_steps=10000000000") == [fixed, grown]


@pytest.mark.parametrize(("arguments", "said"), [(("--gpu", "h100-8"), "h100-80"), (("--gpus", "0"), "one GPU or more")])
def test_bad_input_is_named(arguments: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=said):
        plan(monkeypatch, "--recipe", "demo", *arguments)
