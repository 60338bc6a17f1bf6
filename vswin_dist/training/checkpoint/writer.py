"""Save a training while it goes on: a copy in host memory, which every rank's background thread writes its part of.

A save goes through three states, and the ranks leave each together, at the end of a step: they write, the main rank
commits, and it is saved. Threads call no collective, so a rank that fails leaves none of them waiting for another; its
error is raised at its next step. The copy is laid out as the file will be, so that nothing is serialised afterwards.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Thread
from typing import TypeVar

import torch

from vswin_dist import storage
from vswin_dist.device import Rank
from vswin_dist.errors import Replaced, VswinError
from vswin_dist.lease import UNFENCED, Fence
from vswin_dist.model_card import CARD, ModelCard, card_bytes
from vswin_dist.training.checkpoint.files import MODEL, Position, Written, commit, folder_name, moments_file, write
from vswin_dist.training.checkpoint.folder import clean, prune
from vswin_dist.training.checkpoint.snapshot import Image, Shape, State

T = TypeVar("T")
ATTEMPT = "attempt"  # the file that says which start of the ranks writes below a root
LOOK_EVERY_S = 0.02  # while nothing else is to be done


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is committed."""

    url: str
    position: Position
    write_s: float  # from the copy in host memory to the commit


@dataclass(frozen=True)
class Stall:
    """How long a save held up the steps, in seconds."""

    wait_s: float  # for the save before it
    snapshot_s: float


@dataclass
class _Flight:
    """A save that is not committed yet."""

    position: Position
    writing: Future[dict[str, Written]]  # by this rank
    began: float
    committing: Future[float] | None = None  # by the main rank, to `write_s`


class CheckpointWriter:
    """Saves below `root`, one at a time. Collective: all ranks call the same methods in the same order.

    Args:
        keep: newest checkpoints that stay, see `prune`.
        on_saved: called on every rank when a checkpoint is committed, within one of the methods.
        before_commit: called on the main rank by the background thread.
        fence: of the submission; its number is part of the checkpoints' names.
        waiting: called again and again while a save is waited for, so that it is not taken for a hang.
    """

    def __init__(
        self,
        root: str,
        rank: Rank,
        keep: int,
        on_saved: Callable[[Saved], None] = lambda _: None,
        before_commit: Callable[[], object] = lambda: None,
        fence: Fence = UNFENCED,
        waiting: Callable[[], object] = lambda: None,
    ) -> None:
        self.root, self.rank, self.keep, self.fence = root, rank, keep, fence
        self.on_saved, self.before_commit, self.waiting = on_saved, before_commit, waiting
        self.attempt = ""
        self._model, self._moments = Image(rank.pins), Image(rank.pins)
        self._flight: _Flight | None = None

    @property
    def in_flight(self) -> bool:
        """True from the beginning of a save to its commit; the same on all ranks."""
        return self._flight is not None

    def claim(self) -> None:
        """Let these ranks alone write below the root, and remove what others have left there.

        Those of an earlier start may not have ended: what they commit or write from now on is refused.

        Raises:
            FencedOut: another submission has taken over.
        """
        self.attempt = self.rank.broadcast(uuid.uuid4().hex)
        if self.rank.is_main:
            self.fence.check()
            storage.put_bytes(storage.join(self.root, ATTEMPT), self.attempt.encode())
            clean(self.root)
        self.rank.barrier()

    def save(
        self, position: Position, state: State, card: ModelCard, beside: Mapping[str, Callable[[], bytes]] | None = None
    ) -> Stall:
        """Copy the state to host memory and begin to write it; waits for the save before this one.

        Args:
            beside: further files by name, of which the main rank makes the content in the background.
        """
        began = time.perf_counter()
        self.finish()
        waited = time.perf_counter()
        copied = self._copy(state)
        url = self._url(position)
        writing = _in_background(partial(self._write, url, copied, card, beside or {}))
        self._flight = _Flight(position, writing, began=time.perf_counter())
        return Stall(waited - began, self._flight.began - waited)

    def progress(self) -> None:
        """Take the save in flight a state further where all ranks can; never waits for storage.

        Raises:
            VswinError: of this rank's background thread.
        """
        if (flight := self._flight) is None:
            return
        task = flight.committing or flight.writing
        if task.done():
            task.result()
        if self.rank.any(not task.done()):
            return
        if flight.committing is None:
            written = self.rank.gather(flight.writing.result())
            files = {name: f for each in written for name, f in each.items()}
            flight.committing = _in_background(partial(self._commit, flight, files)) if self.rank.is_main else _done(0.0)
            return
        self._flight = None
        self.on_saved(Saved(self._url(flight.position), flight.position, flight.committing.result()))

    def finish(self) -> None:
        """Wait until nothing is in flight.

        Raises:
            VswinError: of this rank's background thread.
        """
        while self._flight:
            self.waiting()
            self.progress()
            time.sleep(LOOK_EVERY_S if self._flight else 0)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Wait until nothing is in flight before an error of the block, which all ranks meet alike, ends them."""
        try:
            yield
        except VswinError:
            self.finish()
            raise

    def _url(self, position: Position) -> str:
        return storage.join(self.root, folder_name(position.step, self.fence.number))

    def _copy(self, state: State) -> Callable[[], None]:
        """Copy what this rank writes; returns what waits for the copies from a GPU."""
        if self.rank.is_main:
            self._model.lay_out(state.shapes, {})
        for name, tensor in state.weights:
            if self.rank.is_main:
                self._model.put(name, tensor)
        shapes: dict[str, Shape] = {p.key: p.shape if p.is_whole else (p.values.numel(),) for p in state.moments}
        wholes = {p.name: str(list(p.shape)) for p in state.moments if not p.is_whole}
        self._moments.lay_out(shapes, wholes)
        for part in state.moments:
            self._moments.put(part.key, part.values)
        self._has_moments = bool(shapes)
        if self.rank.device.type != "cuda":
            return lambda: None
        event = torch.cuda.Event()
        event.record()
        return event.synchronize

    def _write(
        self, url: str, copied: Callable[[], None], card: ModelCard, beside: Mapping[str, Callable[[], bytes]]
    ) -> dict[str, Written]:
        contents: dict[str, bytes | memoryview] = {}
        if self._has_moments:
            contents[moments_file(self.rank.rank)] = self._moments.content
        if self.rank.is_main:
            contents |= {MODEL: self._model.content, CARD: card_bytes(card)}
            contents |= {name: make() for name, make in beside.items()}
        copied()
        files = {}
        for name, content in contents.items():
            self._check_attempt()
            files[name] = write(url, name, content)
        return files

    def _commit(self, flight: _Flight, files: dict[str, Written]) -> float:
        self.before_commit()
        self._check_attempt()
        self.fence.check()
        commit(self._url(flight.position), flight.position, files)
        seconds = time.perf_counter() - flight.began
        prune(self.root, self.keep, self.fence)
        return seconds

    def _check_attempt(self) -> None:
        """Refuse to write for ranks that others have replaced.

        Raises:
            Replaced: others have.
        """
        try:
            found = storage.read_bytes(storage.join(self.root, ATTEMPT)).decode()
        except FileNotFoundError:
            found = "its folder is gone"
        if found != self.attempt:
            raise Replaced(f"{self.root} is written by another start of this training now ({found}): this one ends")


def _in_background(work: Callable[[], T]) -> Future[T]:
    """Do `work` in a thread that does not keep its process alive."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name="checkpoint", daemon=True).start()
    return future


def _done(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future
