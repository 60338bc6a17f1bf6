"""A trace of some steps of the main rank (`training.profile`), for chrome://tracing or Perfetto."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from vswin_dist import storage
from vswin_dist.errors import StorageError, TrackingError
from vswin_dist.tracking import NullRun, Run

FOLDER = "profile"
_log = logging.getLogger(__name__)


class StepProfiler:
    """Traces `steps`; the trace goes beside the checkpoints, in the folder `root`, and into the run's artifacts."""

    def __init__(self, steps: range = range(0), root: str = "", tracking: Run | None = None) -> None:
        self.steps, self._root, self._tracking = steps, root, tracking or NullRun()
        self._profile: torch.profiler.profile | None = None

    @contextmanager
    def __call__(self, step: int) -> Iterator[None]:
        """Trace the block, which is `step`, where that is asked for; the last one writes the trace."""
        if step not in self.steps:
            yield
            return
        if self._profile is None:
            self._profile = torch.profiler.profile()  # of the CPU, and the GPU where there is one
            self._profile.start()
        yield
        if step == self.steps[-1]:
            self._profile.stop()
            self._keep(self._profile)
            self._profile = None

    def _keep(self, profile: torch.profiler.profile) -> None:
        name = f"steps-{self.steps[0]}-{self.steps[-1]}.json.gz"
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / name
            profile.export_chrome_trace(str(trace))
            try:
                storage.put_file(trace, storage.join(self._root, FOLDER, name))
                self._tracking.artifact_file(f"{FOLDER}/{name}", trace)
            except (StorageError, TrackingError) as error:  # the training is worth more
                _log.warning("the trace of steps %d..%d is not kept: %s", self.steps[0], self.steps[-1], error)


def steps_of(setting: str | None, last_step: int) -> range:
    """Return the steps that `training.profile` names, `last_step` being the training's."""
    if setting is None:
        return range(0)
    first, last = map(int, setting.split(".."))
    return range(first, min(last, last_step) + 1)
