"""Portable checkpoints: committed whole, checked when read, pruned without losing the best."""

from __future__ import annotations

import hashlib
import itertools
import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import checkpoints
from vswin_dist import lease
from vswin_dist.errors import CheckpointError, FencedOut
from vswin_dist.lease import UNFENCED, Fence
from vswin_dist.model_card import ModelCard
from vswin_dist.training import checkpoint
from vswin_dist.training.checkpoint import Position, files

MOMENTS = "optimizer-00000.safetensors"
CARD = ModelCard({"name": "swin_nano", "num_classes": 2}, ["a", "b"], {}, {})


def save(root: Path, step: int, top1: float | None = None, fence: Fence = UNFENCED) -> str:
    metrics = {} if top1 is None else {"val/top1": top1}
    position = Position(step, 1, 16, "run", "f" * 32, {"run.name": "x"}, [], {"step": 4}, metrics)
    weights, moments = {"head.weight": torch.full((2, 3), float(step))}, {"exp_avg.head.weight": torch.ones(2, 3)}
    return checkpoints.save(str(root), position, weights, moments, CARD, fence)


def test_it_comes_back_as_it_was(tmp_path: Path) -> None:
    url = save(tmp_path, 7, 50.0)
    found = checkpoint.list_checkpoints(str(tmp_path))
    assert [f.url for f in found] == [url]
    assert found[0].position.step == 7 and found[0].position.metrics == {"val/top1": 50.0}
    assert torch.equal(checkpoint.load_weights(url)["head.weight"], torch.full((2, 3), 7.0))
    assert torch.equal(checkpoint.load_moments(url)["exp_avg.head.weight"], torch.ones(2, 3))
    assert torch.equal(load_file(f"{url}/model.safetensors")["head.weight"], torch.full((2, 3), 7.0))
    assert sorted(p.name for p in Path(url).iterdir()) == [
        "checkpoint.json",
        "model.json",
        "model.safetensors",
        "optimizer-00000.safetensors",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["attempt", "step-00000007"], "scratch was left"


def test_one_of_the_first_version_is_read(tmp_path: Path) -> None:
    weights, moments = (
        {"w": torch.arange(6.0).view(2, 3)},
        {"exp_avg.w": torch.ones(2, 3), "exp_avg_sq.w": torch.zeros(2, 3)},
    )
    folder = tmp_path / "step-00000004"
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    save_file(moments, folder / "optimizer.safetensors")
    (folder / "model.json").write_text("{}")
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.iterdir()
    }
    position = asdict(Position(4, 1, 16, "run", "f" * 32, {}, [], {"step": 4}))
    body = {"format": "vswin-checkpoint", "version": 1, "position": position, "files": files}
    (folder / "checkpoint.json").write_text(json.dumps(body))
    found = checkpoint.newest_whole(str(tmp_path))
    assert found and found.position.step == 4
    assert torch.equal(checkpoint.load_weights(found.url)["w"], weights["w"])
    assert {n: t.tolist() for n, t in checkpoint.load_moments(found.url).items()} == {
        n: t.tolist() for n, t in moments.items()
    }


def test_a_half_written_one_is_none(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (Path(save(tmp_path, 2)) / "checkpoint.json").unlink()
    cut = Path(save(tmp_path, 3)) / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    assert [f.position.step for f in checkpoint.list_checkpoints(str(tmp_path))] == [1]


def test_what_a_killed_writer_sent_last_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It may arrive after everything uncommitted was removed, and be gone while it is looked at."""
    whole, late = save(tmp_path, 1), Path(save(tmp_path, 2))
    (late / checkpoint.COMMIT).unlink()
    (tmp_path / "step-00000003").mkdir()
    held = {path.name for path in late.iterdir()}
    found = checkpoint.newest_whole(str(tmp_path))
    assert found and found.url == whole and not capsys.readouterr().out
    assert {path.name for path in late.iterdir()} == held and not list(tmp_path.glob("damaged-*"))


@pytest.mark.slow
def test_no_flipped_bit_of_a_commit_file_is_taken_for_another_position(tmp_path: Path) -> None:
    file = Path(save(tmp_path, 7, 50.0)) / checkpoint.COMMIT
    whole = file.read_bytes()
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(CheckpointError):
            checkpoint.verify(str(file.parent))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *itertools.product([checkpoint.MODEL, MOMENTS, "model.json", checkpoint.COMMIT], ["flipped", "cut"]),
        *itertools.product([checkpoint.MODEL, MOMENTS, "model.json"], ["gone"]),
    ],
)
def test_a_damaged_one_is_set_apart_and_the_one_before_is_taken(
    tmp_path: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, damaged = save(tmp_path, 1), Path(save(tmp_path, 2))
    data = bytearray((damaged / name).read_bytes())
    data[len(data) // 2] ^= 0x80
    content = {"flipped": bytes(data), "cut": bytes(data[:-1]), "gone": None}[damage]
    (damaged / name).unlink()
    if content is not None:
        (damaged / name).write_bytes(content)
    held = {p.name: p.read_bytes() for p in damaged.iterdir()}

    found = checkpoint.newest_whole(str(tmp_path))
    assert found and found.url == whole and found.position.step == 1
    [apart] = tmp_path.glob("damaged-step-00000002-*")
    assert {p.name: p.read_bytes() for p in apart.iterdir()} == held
    [line] = capsys.readouterr().out.splitlines()
    assert str(apart) in line and (name in line or "checkpoint" in line)
    checkpoint.clean(str(tmp_path))
    assert apart.exists() and checkpoint.newest_whole(str(tmp_path)) == found


def test_one_of_a_later_version_is_not_taken_for_damaged(tmp_path: Path) -> None:
    save(tmp_path, 1)
    commit = Path(save(tmp_path, 2)) / checkpoint.COMMIT
    commit.write_text(commit.read_text().replace('"version": 3', '"version": 4'))
    with pytest.raises(CheckpointError, match="version 4; expected 'vswin-checkpoint', 1 or 2 or 3"):
        checkpoint.newest_whole(str(tmp_path))
    assert commit.exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from vswin_dist import storage
from tests.unit.training.test_checkpoint import save
put = storage.put_bytes
def put_and_die(url, data):
    if url.endswith("model.json"):
        os.kill(os.getpid(), signal.SIGKILL)
    put(url, data)
storage.put_bytes = put_and_die
save(Path(sys.argv[1]), 3)
"""


@pytest.mark.slow
def test_what_a_killed_save_leaves_is_removed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 1)
    damaged = Path(save(tmp_path, 2)) / "model.safetensors"
    damaged.write_bytes(b"")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    left = {p.name for p in tmp_path.glob("step-00000003/*")}
    assert left == {"model.safetensors", MOMENTS}
    (tmp_path / "vswin-checkpoint-x").mkdir()  # of an earlier version
    (tmp_path / "quarantine.jsonl").write_text("")
    checkpoint.prune(str(tmp_path), keep=2)
    assert capfd.readouterr().out == "", "told at each save"
    checkpoint.clean(str(tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {"step-00000001", "step-00000002", "quarantine.jsonl", "attempt"}
    checkpoint.clean(str(tmp_path / "absent"))


def test_damage_is_found(tmp_path: Path) -> None:
    url = save(tmp_path, 1)
    path = Path(url) / MOMENTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"optimizer-00000\.safetensors is damaged: sha256"):
        checkpoint.load_moments(url)


def test_one_on_a_disk_is_read_where_it_lies(tmp_path: Path) -> None:
    """Of eight ranks with a checkpoint of gigabytes each copy would be one in the memory of most nodes' /tmp."""
    url = save(tmp_path, 1)
    with files.fetched(url, files.MODEL) as paths:
        assert paths == [Path(url) / files.MODEL]
    assert checkpoint.load_weights(url).keys() and Path(url, files.MODEL).exists()


def test_the_best_and_the_newest_stay(tmp_path: Path) -> None:
    for step, top1 in ((1, 10.0), (2, 60.0), (3, None), (4, 20.0), (5, None)):
        save(tmp_path, step, top1)
        checkpoint.prune(str(tmp_path), keep=2)
    found = checkpoint.list_checkpoints(str(tmp_path))
    assert [f.position.step for f in found] == [2, 4, 5]
    best = checkpoint.best(found)
    assert best and best.position.step == 2
    assert checkpoint.best(found[2:]) is found[2] and checkpoint.best([]) is None


def fenced(root: Path, take_over: bool = True) -> Fence:
    """The fence of another submission of the run, which takes it from whoever holds it."""
    number, claim = lease._claim(str(root / "lease"), "the run", "wait", take_over)
    return Fence(str(root / "lease"), number, claim.id)


def test_a_submission_that_was_taken_over_commits_and_removes_nothing(tmp_path: Path) -> None:
    root, first = tmp_path / "0001", fenced(tmp_path)
    for step in (1, 2, 3):
        assert Path(save(root, step, fence=first)).name == f"step-0000000{step}"
    second = fenced(tmp_path)
    assert Path(save(root, 4, fence=second)).name == "step-00000004-0002"
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}
    with pytest.raises(FencedOut):
        save(root, 4, fence=first)
    with pytest.raises(FencedOut):
        checkpoint.prune(str(root), 1, first)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert [f.position.step for f in checkpoint.list_checkpoints(str(root))] == [1, 2, 3, 4]
    checkpoint.prune(str(root), 1, second)
    assert [f.position.step for f in checkpoint.list_checkpoints(str(root))] == [4]


def test_what_is_committed_too_late_is_no_checkpoint(tmp_path: Path) -> None:
    """As by a process that was stopped between its look at the lease and its write."""
    root, first = tmp_path / "0001", fenced(tmp_path)
    save(root, 1, fence=first)
    save(root, 2, fence=first)
    second = fenced(tmp_path)
    checkpoint.begin(str(root), 2, second)
    checkpoint.begin(str(root), 1, second)  # a restart of its ranks, after which steps of its own count as before
    late = replace(UNFENCED, number=first.number)
    save(root, 2, fence=late)
    save(root, 4, fence=late)
    assert [f.position.step for f in checkpoint.list_checkpoints(str(root))] == [1, 2]
    save(root, 3, fence=second)
    newest = checkpoint.newest_whole(str(root))
    assert newest and Path(newest.url).name == "step-00000003-0002"
    third = fenced(tmp_path)
    checkpoint.begin(str(root), 3, third)
    save(root, 4, fence=replace(UNFENCED, number=second.number))
    save(root, 4, fence=third)
    assert [Path(f.url).name for f in checkpoint.list_checkpoints(str(root))][2:] == [
        "step-00000003-0002",
        "step-00000004-0003",
    ]


def test_what_a_model_points_to_and_what_is_loaded_stays(tmp_path: Path) -> None:
    registered, loaded, left = (save(tmp_path, step) for step in (1, 2, 3))
    checkpoint.keep_for_model(registered, "champions")
    (Path(left) / f"loading-{time.time() - 2 * 24 * 3600:.0f}-x").write_text("")  # by a reader that was killed
    save(tmp_path, 4)
    with checkpoint.in_use(loaded):
        checkpoint.prune(str(tmp_path), keep=1)
        assert [f.url for f in checkpoint.list_checkpoints(str(tmp_path))][:2] == [registered, loaded]
        assert not Path(left).exists()
    checkpoint.prune(str(tmp_path), keep=1)
    assert not Path(loaded).exists() and checkpoint.verify(registered).step == 1
