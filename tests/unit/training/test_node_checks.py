"""What nodes have against what a training needs: which row is wrong, and what is said to do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vswin_dist.config import load_settings
from vswin_dist.errors import PreflightError
from vswin_dist.training.node_checks import Check, check_nodes, refuse, table
from vswin_dist.training.node_facts import NodeFacts, look_around
from vswin_dist.training.preflight import preflight
from vswin_dist.training.spec import TrainingSpec

GIB = 2**30
NODE = NodeFacts(
    host="one",
    clock=0.0,
    versions={"python": "3.11.7", "torch": "2.13.0"},
    cpus=8,
    memory=64 * GIB,
    shared_memory=8 * GIB,
    cache=100 * GIB,
    scratch=100 * GIB,
    files=65536,
    gpus=(),
    storage_s=0.01,
)
OTHER = replace(NODE, host="two")


@pytest.fixture
def spec(motion_shards: Path, tmp_path: Path) -> TrainingSpec:
    own = ("run.name=x", f"storage.root={tmp_path}/runs", "tracking.uri=none", f"data.train={motion_shards}/train")
    return preflight(load_settings("demo", [*own, "data.cache_gb=50", "data.workers=2"]))


def found(spec: TrainingSpec, *nodes: NodeFacts, off: float = 0.0) -> dict[str, Check]:
    return {c.what: c for c in check_nodes(spec, [(n, off) for n in nodes])}


def test_nodes_that_fit_are_ok(spec: TrainingSpec) -> None:
    checks = found(spec, NODE, OTHER)
    assert {c.state for c in checks.values()} == {"ok"}
    assert {
        "versions",
        "clocks",
        "open files",
        "storage",
        "memory of one",
        "shared memory of two",
        "disk of two for shards",
    } <= set(checks)
    refuse(list(checks.values()))


@pytest.mark.parametrize(
    ("change", "what", "state", "said"),
    [
        ({"versions": {"python": "3.11.7", "torch": "2.12.0"}}, "versions", "error", "two has torch 2.12.0, one 2.13.0"),
        ({"files": 128}, "open files", "error", "128 open files a process at two"),
        ({"storage_error": "s3://b/x: denied"}, "storage from two", "error", "denied"),
        ({"memory": GIB}, "memory of two", "error", "of 1.0 free"),
        ({"shared_memory": 1 << 20}, "shared memory of two", "error", "of 0.0"),
        ({"cache": 48 * 10**9}, "disk of two for shards", "error", "46.6 GiB of 44.7"),
        ({"cache": 51 * 10**9}, "disk of two for shards", "warning", "46.6 GiB of 47.5"),
    ],
)
def test_what_is_wrong_is_named_with_its_remedy(
    spec: TrainingSpec, change: dict[str, object], what: str, state: str, said: str
) -> None:
    checks = found(spec, NODE, replace(OTHER, **change))  # type: ignore[arg-type]
    wrong = [c for c in checks.values() if c.state != "ok"]
    assert [(c.what, c.state) for c in wrong] == [(what, state)]
    assert said in wrong[0].value and wrong[0].remedy
    assert table(list(checks.values())).splitlines()[2].startswith(f"| {what} | {state} |"), "what is wrong stands first"
    if state == "error":
        with pytest.raises(PreflightError, match=what):
            refuse(list(checks.values()))


@pytest.mark.parametrize(("off", "state"), [(1.0, "ok"), (10.0, "warning"), (900.0, "error")])
def test_clocks(spec: TrainingSpec, off: float, state: str) -> None:
    assert found(spec, NODE, off=off)["clocks"].state == state


def test_checkpoints_on_object_storage_need_room_where_they_are_copied_to(spec: TrainingSpec) -> None:
    remote = replace(spec, root="s3://bucket/runs/x")
    assert found(remote, NODE)["disk of one for temporary files"].state == "ok"
    need = 2 * 12 * spec.parameters  # weights and two moments, for each of the two ranks
    assert found(remote, replace(NODE, scratch=need - 1))["disk of one for temporary files"].state == "error"
    assert found(remote, replace(NODE, scratch=2 * need))["disk of one for temporary files"].state == "ok"


def test_offloaded_states_need_memory_of_the_host(spec: TrainingSpec) -> None:
    s = spec.settings
    one = replace(s.training, use_gpu=True, workers=1, zero_stage=1)
    gpu = replace(NODE, gpus=(("NVIDIA A10G", 20 * GIB),), memory=2 * GIB)
    plain, offloaded = (
        replace(spec, settings=replace(s, training=t), parameters=150_000_000) for t in (one, replace(one, offload=True))
    )
    assert found(plain, gpu)["memory of one"].state == "ok"
    assert found(offloaded, gpu)["memory of one"].state == "error", "1.7 GiB of states beside the process"


def test_a_gpu_that_is_too_small_is_told_what_fits(spec: TrainingSpec) -> None:
    s = spec.settings
    large = replace(s.training, use_gpu=True, micro_batch=8, workers=1, global_batch=8, precision="bf16")
    data = replace(s.data, frames=32, size=224)
    model = replace(s.model, name="swin_l", patch_size=None)
    asked = replace(spec, settings=replace(s, training=large, data=data, model=model))
    check = found(asked, replace(NODE, gpus=(("NVIDIA A10G", 20 * GIB),)))["GPU memory of one"]
    assert check.state == "error" and "NVIDIA A10G" in check.value
    assert "training.micro_batch=4" in check.remedy and "model.gradient_checkpointing=selective" in check.remedy


def test_this_machine_is_seen_as_it_is(tmp_path: Path) -> None:
    facts = look_around(str(tmp_path / "runs"), None)
    assert facts.storage_error == "" and facts.memory > 0 and facts.versions["torch"].startswith("2.")
    assert not list((tmp_path / "runs").iterdir()), "the probe is gone"
    (tmp_path / "file").write_text("")
    assert "file" in look_around(str(tmp_path / "file" / "runs"), None).storage_error
