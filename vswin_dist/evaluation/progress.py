"""How far an evaluation is, in a line now and then."""

from __future__ import annotations

import time

from tqdm import tqdm

from vswin_dist.device import Rank

EVERY_S = 10.0


class Progress:
    """Counts this rank's videos; the main rank prints for all, each of which has an equal part.

    Args:
        samples: videos of the dataset.
        todo: those that are not scored yet.
        views: of a video.
    """

    def __init__(self, rank: Rank, samples: int, todo: int, views: int) -> None:
        self.rank, self.samples, self.todo, self.views = rank, samples, todo, views
        self.done, self.began = 0, time.monotonic()
        self.shown = self.began
        before = f"; {samples - todo:,} are scored already" if todo < samples else ""
        rank.print(f"scoring {todo:,} of {samples:,} videos, {views} views of each, on {rank.world_size} ranks{before}")

    def show(self, videos: int, last: bool) -> None:
        """Take note of `videos` more, and print where it is time, and at this rank's last ones."""
        self.done += videos
        now, done = time.monotonic(), min(self.todo, self.done * self.rank.world_size)
        done = self.todo if last else done
        if not last and now - self.shown < EVERY_S:
            return
        self.shown, rate = now, done / max(now - self.began, 1e-9)
        about = "about " if self.rank.world_size > 1 else ""
        self.rank.print(
            f"{about}{self.samples - self.todo + done:,} of {self.samples:,} videos, {rate:.1f} videos/s, "
            f"{rate * self.views:.1f} views/s, {tqdm.format_interval((self.todo - done) / rate)} left"
        )
