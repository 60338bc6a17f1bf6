"""Check that the nodes of a cluster can hold a training: what each of them has, beside what the training will need.

A row for each thing: its state, its value, and what to do. Done in full by `--dry-run`, and without the collective of all
ranks before every start.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from vswin_dist import storage
from vswin_dist.config import Settings
from vswin_dist.errors import PreflightError
from vswin_dist.planning.memory import CPU_PROCESS, Setup, nearest_that_fit, optimizer_bytes, predict
from vswin_dist.training.initial_model import architecture_of
from vswin_dist.training.node_facts import NodeFacts
from vswin_dist.training.spec import TrainingSpec

GIB = 2**30
LOADER_PROCESS = int(0.21e9)  # resident, of its own (measured, docs/benchmarks.md)
TIGHT = 0.9  # of what there is, from where on it is a warning
SKEW_S = (2.0, 300.0)  # from where on clocks apart are a warning, and an error: S3 refuses requests 15 minutes off
STATES = ("ok", "warning", "error")
State = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    what: str
    state: State
    value: str
    remedy: str = ""


def setup_of(s: Settings, world_size: int) -> Setup:
    """Say what the memory of a rank depends on."""
    d, t = s.data, s.training
    return Setup(
        clip=(d.frames, d.size, d.size),
        micro_batch=t.micro_batch,
        world_size=world_size,
        zero_stage=t.zero_stage,
        precision=t.precision,
        device="cuda" if t.use_gpu else "cpu",
        averages=t.ema_decay > 0,
        offloads=t.offload,
    )


def check_nodes(spec: TrainingSpec, nodes: list[tuple[NodeFacts, float]]) -> list[Check]:
    """Hold what `spec` needs against the nodes, each with the seconds that its clock is off."""
    ranks = {id(f): ranks_of(spec, f) for f, _ in nodes}
    checks = [_versions(nodes), _clocks(nodes), _files(spec, nodes, ranks), *_storage(nodes)]
    checks += [_host_memory(spec, f, ranks[id(f)]) for f, _ in nodes if ranks[id(f)]]
    checks += [_shared_memory(spec, f, ranks[id(f)]) for f, _ in nodes if ranks[id(f)] and spec.settings.data.workers]
    checks += [_disk(spec, f) for f, _ in nodes if spec.settings.data.cache_gb]
    checks += [_scratch(spec, f) for f, _ in nodes if not storage.is_local(spec.root)]
    checks += [_gpu_memory(spec, f) for f, _ in nodes if spec.settings.training.use_gpu and f.gpus]
    return checks


def ranks_of(spec: TrainingSpec, facts: NodeFacts) -> int:
    """Return the most ranks that a node can be given."""
    t = spec.settings.training
    by_cpus = int(facts.cpus // t.cpus_per_worker)
    return min(t.workers, len(facts.gpus) if t.use_gpu else by_cpus)


def _versions(nodes: list[tuple[NodeFacts, float]]) -> Check:
    first = nodes[0][0]
    differing = [
        f"{f.host} has {name} {f.versions[name]}, {first.host} {first.versions[name]}"
        for f, _ in nodes
        for name in first.versions
        if f.versions[name] != first.versions[name]
    ]
    if differing:
        return Check("versions", "error", "; ".join(differing), "install the same on all nodes (constraints.txt)")
    return Check("versions", "ok", ", ".join(f"{k} {v}" for k, v in first.versions.items()))


def _clocks(nodes: list[tuple[NodeFacts, float]]) -> Check:
    facts, worst = max(nodes, key=lambda n: n[1])
    state: State = "error" if worst > SKEW_S[1] else "warning" if worst > SKEW_S[0] else "ok"
    remedy = "" if state == "ok" else "let chrony or ntpd set the clocks"
    return Check("clocks", state, f"{facts.host} is {worst:.1f} s off the driver", remedy)


def _files(spec: TrainingSpec, nodes: list[tuple[NodeFacts, float]], ranks: dict[int, int]) -> Check:
    """Count a few descriptors for each batch that a rank's loader makes ahead, and its connections."""
    need = 256 + 8 * spec.settings.data.workers * spec.settings.data.prefetch
    facts = min((f for f, _ in nodes), key=lambda f: f.files)
    state: State = "ok" if facts.files >= need else "error"
    value = f"{facts.files:,} open files a process at {facts.host}, {need:,} needed"
    return Check("open files", state, value, "" if state == "ok" else f"ulimit -n {2 * need} before Ray is started there")


def _storage(nodes: list[tuple[NodeFacts, float]]) -> Iterable[Check]:
    for facts, _ in nodes:
        if facts.storage_error:
            remedy = "give every node the keys and the way to the storage; ranks on it could not save"
            yield Check(f"storage from {facts.host}", "error", facts.storage_error, remedy)
    slowest = max((f for f, _ in nodes), key=lambda f: f.storage_s)
    if not any(f.storage_error for f, _ in nodes):
        yield Check("storage", "ok", f"written, read and removed from every node, {slowest.storage_s * 1e3:.0f} ms at most")


def _compared(what: str, need: float, have: float, remedy: str, said: str = "") -> Check:
    state: State = "error" if need > have else "warning" if need > TIGHT * have else "ok"
    value = f"{need / GIB:.1f} GiB of {have / GIB:.1f}{said}"
    return Check(what, state, value, "" if state == "ok" else remedy)


def _host_memory(spec: TrainingSpec, facts: NodeFacts, ranks: int) -> Check:
    s = spec.settings
    rank = CPU_PROCESS
    if not s.training.use_gpu:
        rank = predict(architecture_of(s, len(spec.train.classes)), setup_of(s, s.training.workers)).total
    elif s.training.offload:
        rank += optimizer_bytes(spec.parameters, setup_of(s, s.training.workers))
    need = ranks * (rank + s.data.workers * LOADER_PROCESS)
    said = f" free, for {ranks} ranks of {rank / GIB:.2f} and {s.data.workers} loader processes each"
    return _compared(f"memory of {facts.host}", need, facts.memory, _smaller(spec, facts.memory // max(ranks, 1)), said)


def _gpu_memory(spec: TrainingSpec, facts: NodeFacts) -> Check:
    name, have = min(facts.gpus, key=lambda g: g[1])
    s = spec.settings
    found = predict(architecture_of(s, len(spec.train.classes)), setup_of(s, s.training.workers))
    said = f" (activations {found.activations / GIB:.1f}, optimizer {found.optimizer / GIB:.1f}) of {name}"
    return _compared(f"GPU memory of {facts.host}", found.total, have, _smaller(spec, have), said)


def _smaller(spec: TrainingSpec, limit: int) -> str:
    s = spec.settings
    batch = s.training.global_batch // s.training.workers
    setup = setup_of(s, s.training.workers)
    fits = nearest_that_fit(architecture_of(s, len(spec.train.classes)), setup, limit, batch)
    return f"by prediction {' or '.join(fits)} fits" if fits else "no smaller micro-batch fits by prediction: add memory"


def _shared_memory(spec: TrainingSpec, facts: NodeFacts, ranks: int) -> Check:
    """Batches wait in /dev/shm."""
    d, t = spec.settings.data, spec.settings.training
    values = 1.5 if d.pixel_format == "yuv" else 3
    batch = t.micro_batch * values * d.frames * d.size * d.size
    need = ranks * d.workers * (d.prefetch + 1) * batch
    remedy = "lower data.prefetch or data.workers, or give the container more (docker run --shm-size)"
    return _compared(f"shared memory of {facts.host}", need, facts.shared_memory, remedy)


def _disk(spec: TrainingSpec, facts: NodeFacts) -> Check:
    need = spec.settings.data.cache_gb * 1e9
    remedy = "lower data.cache_gb, or point VSWIN_CACHE to a larger disk"
    return _compared(f"disk of {facts.host} for shards", need, facts.cache, remedy)


def _scratch(spec: TrainingSpec, facts: NodeFacts) -> Check:
    """Hold a checkpoint against the place of temporary files, to which each rank of a node copies it from object storage."""
    need = ranks_of(spec, facts) * (4 + setup_of(spec.settings, 1).state) * spec.parameters
    return _compared(f"disk of {facts.host} for temporary files", need, facts.scratch, "point TMPDIR to a larger disk")


def table(checks: list[Check]) -> str:
    """Write the checks as a Markdown table, what is wrong first."""
    rows = sorted(checks, key=lambda c: -STATES.index(c.state))
    return "\n".join(
        ["| check | state | value | remedy |", "|---|---|---|---|"]
        + [f"| {c.what} | {c.state} | {c.value} | {c.remedy} |" for c in rows]
    )


def refuse(checks: list[Check]) -> None:
    """Raise what is an error.

    Raises:
        PreflightError: names each with its remedy.
    """
    errors = [f"{c.what}: {c.value}. {c.remedy}" for c in checks if c.state == "error"]
    if errors:
        raise PreflightError("; ".join(errors))
