"""Portable checkpoints: committed whole, checked when read, pruned without losing the best."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vswin_dist.errors import CheckpointError
from vswin_dist.serving.export import ModelCard
from vswin_dist.training import checkpoint
from vswin_dist.training.checkpoint import Position

CARD = ModelCard({"name": "swin_nano", "num_classes": 2}, ["a", "b"], {}, {})


def save(root: Path, step: int, top1: float | None = None) -> str:
    metrics = {} if top1 is None else {"val/top1": top1}
    position = Position(step, 1, 16, "run", "f" * 32, {"run.name": "x"}, [], {"step": 4}, metrics)
    return checkpoint.save(str(root), position, {"head.weight": torch.full((2, 3), float(step))},
                           {"exp_avg.head.weight": torch.ones(2, 3)}, CARD)


def test_it_comes_back_as_it_was(tmp_path: Path) -> None:
    url = save(tmp_path, 7, 50.0)
    found = checkpoint.list_checkpoints(str(tmp_path))
    assert [f.url for f in found] == [url]
    assert found[0].position.step == 7 and found[0].position.metrics == {"val/top1": 50.0}
    assert torch.equal(checkpoint.load_tensors(url, checkpoint.MODEL)["head.weight"], torch.full((2, 3), 7.0))
    assert sorted(p.name for p in Path(url).iterdir()) == [
        "checkpoint.json", "model.json", "model.safetensors", "optimizer.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000007"], "scratch was left"


def test_a_half_written_one_is_none(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (Path(save(tmp_path, 2)) / "checkpoint.json").unlink()
    cut = Path(save(tmp_path, 3)) / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    assert [f.position.step for f in checkpoint.list_checkpoints(str(tmp_path))] == [1]


KILLED = """
import os, signal, sys
from pathlib import Path
from vswin_dist import storage
from tests.unit.training.test_checkpoint import save
put = storage.put_file
def put_and_die(local, url):
    put(local, url)
    if url.endswith("optimizer.safetensors"):
        os.kill(os.getpid(), signal.SIGKILL)
storage.put_file = put_and_die
save(Path(sys.argv[1]), 3)
"""


def test_what_a_killed_save_leaves_is_removed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 1)
    damaged = Path(save(tmp_path, 2)) / "model.safetensors"
    damaged.write_bytes(b"")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    left = {p.name for p in tmp_path.iterdir()}
    assert "step-00000003" in left and any(name.startswith("vswin-checkpoint-") for name in left)
    (tmp_path / "quarantine.jsonl").write_text("")
    checkpoint.prune(str(tmp_path), keep=2)
    assert capfd.readouterr().out == "", "told at each save"
    checkpoint.clean(str(tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {"step-00000001", "step-00000002", "quarantine.jsonl"}
    checkpoint.clean(str(tmp_path / "absent"))


def test_damage_is_found(tmp_path: Path) -> None:
    url = save(tmp_path, 1)
    path = Path(url) / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is damaged: sha256"):
        checkpoint.load_tensors(url, checkpoint.OPTIMIZER)


def test_the_best_and_the_newest_stay(tmp_path: Path) -> None:
    for step, top1 in ((1, 10.0), (2, 60.0), (3, None), (4, 20.0), (5, None)):
        save(tmp_path, step, top1)
        checkpoint.prune(str(tmp_path), keep=2)
    found = checkpoint.list_checkpoints(str(tmp_path))
    assert [f.position.step for f in found] == [2, 4, 5]
    best = checkpoint.best(found)
    assert best and best.position.step == 2
    assert checkpoint.best(found[2:]) is found[2] and checkpoint.best([]) is None
