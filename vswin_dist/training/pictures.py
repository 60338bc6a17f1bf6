"""The page of a training, with pictures: at each new best and at the end, in the run's artifacts, beside the checkpoints.

The ranks do nothing for it: the checkpoint of an evaluation holds what was found of every video, and the driver, which
waits for them, has a process of its own draw it (`vswin_dist/evaluation/page.py`). Where that fails or the store refuses the
files, a warning says so: the training goes on, and what was drawn stays in `report/` beside the checkpoints.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from vswin_dist import storage
from vswin_dist.errors import VswinError, WorkFailed
from vswin_dist.evaluation import page
from vswin_dist.tracking import Run, curves
from vswin_dist.training import checkpoint, validated
from vswin_dist.training.spec import TrainingSpec
from vswin_dist.training.trainer import WorkerConfig

FOLDER = "report"  # beside the checkpoints
LOOK_EVERY_S = 20.0
LEAST_APART_S = 60.0  # from one page to the next, in the course of a training
LONGEST_S = 900.0  # that drawing may take
IN_THE_COURSE = (page.ASIDE,)  # the ranks go first, which may share this machine


@contextmanager
def pictured(spec: TrainingSpec, config: WorkerConfig, tracking: Run) -> Iterator[None]:
    """Draw each new best while the block trains, and all of it once it has ended well; unless `evaluation.report` is off."""
    if not spec.settings.evaluation.report:
        yield
        return
    painter = Painter(spec, config, tracking)
    try:
        yield
    finally:
        painter.close()
    if painter.draw(checkpoint.best(checkpoint.list_checkpoints(config.checkpoints))):
        print(f"{'report':24} {storage.join(painter.out, page.PAGE)}", flush=True)


class Painter:
    """A thread of the driver that has a page made of each new best checkpoint, one at a time."""

    def __init__(self, spec: TrainingSpec, config: WorkerConfig, tracking: Run) -> None:
        self.spec, self.config, self.tracking = spec, config, tracking
        self.out = storage.join(config.checkpoints, FOLDER)
        self._closing = threading.Event()
        self._process: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._watch, name="pictures", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Look for no more, and end what is being drawn: the last page is another."""
        self._closing.set()
        if process := self._process:
            process.kill()
        self._thread.join(LONGEST_S)

    def draw(self, best: checkpoint.Found | None, options: Sequence[str] = ()) -> bool:
        """Make the page of `best` and hand it to the store; False, with a warning, where that fails.

        Args:
            options: of the process that draws; with some, it is not the last time.
        """
        try:
            self.config.run.fence.check()
            for name in self._make(self._order(best, so_far=bool(options)), options):
                self.tracking.artifact(name, storage.read_bytes(storage.join(self.out, name)).decode())
        except (VswinError, OSError) as error:
            if not (self._closing.is_set() and options):
                where = f"What there is stands in {self.out}"
                print(f"warning: the report of this training is not complete: {error}. {where}", file=sys.stderr, flush=True)
            return False
        return True

    def _watch(self) -> None:
        drawn, last = "", -LEAST_APART_S
        while not self._closing.wait(LOOK_EVERY_S):
            try:
                best = checkpoint.best(checkpoint.list_checkpoints(self.config.checkpoints, verbose=False))
            except (VswinError, OSError):
                continue  # the ranks meet the same storage, and say so
            if best and best.position.metrics and best.url != drawn and time.monotonic() - last >= LEAST_APART_S:
                drawn, last = best.url, time.monotonic()
                self.draw(best, IN_THE_COURSE)

    def _order(self, best: checkpoint.Found | None, so_far: bool) -> page.Order:
        s, spec = self.spec.settings, self.spec
        found = storage.join(best.url, validated.FILE) if best else ""
        step = f"step {best.position.step:,}, " if best else ""
        facts = {"recipe": s.recipe or "-", "model": s.model.name, "trained on": spec.train.name, "run": self.tracking.id}
        if best and best.position.metrics:
            facts["validated with"] = f"{s.evaluation.clips} x {s.evaluation.crops} views; it chose the checkpoint"
        return page.Order(
            title=f"{s.run.name}: {step}the best{' so far' * so_far}",
            out=self.out,
            predictions=found if found and storage.exists(found) else None,
            data=s.data.val,
            train=s.data.train,
            classes=list(s.data.classes) if s.data.classes else None,
            curves=curves(self.tracking.reference, [*page.LOSSES, *page.ACCURACIES]),
            facts=facts,
            s3_endpoint=s.storage.s3_endpoint,
        )

    def _make(self, order: page.Order, options: Sequence[str]) -> list[str]:
        paths = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-m", page.__name__, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )
        try:
            names, said = self._process.communicate(json.dumps(asdict(order)), LONGEST_S)
        except subprocess.TimeoutExpired as error:
            raise WorkFailed(f"drawing took longer than {LONGEST_S:.0f} s") from error
        finally:
            self._process.kill()
            self._process.wait()
        if self._process.returncode:
            raise WorkFailed(f"drawing failed: {(said.strip().splitlines() or ['no word'])[-1]}")
        return names.splitlines()
