"""Small real videos and sound files for tests, rendered with PyAV."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np


def picture(number: int, width: int, height: int, seed: int) -> np.ndarray:
    """uint8 [height, width, 3]: a bright square that moves by 3 pixels a frame over a still pattern."""
    background = np.random.default_rng(seed).integers(0, 100, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    frame = np.kron(background, np.ones((8, 8, 1), dtype=np.uint8))[:height, :width].copy()
    x = (seed * 7 + 3 * number) % max(1, width - 12)
    frame[height // 3 : height // 3 + 12, x : x + 12] = 250
    return frame


def make_video(
    path: Path,
    frames: int = 24,
    size: tuple[int, int] = (96, 64),
    seed: int = 0,
    rate: int = 12,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    times: list[int] | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Write a video; `times` gives the frames' times in 1/1000 s (else evenly by `rate`)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    with av.open(str(path), "w", options=options or {}) as out:
        stream: Any = out.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(i, width, height, seed), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def make_sound(path: Path) -> Path:
    """Write a file with sound and no picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4") as out:
        stream: Any = out.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def make_folders(root: Path, classes: int = 2, each: int = 4, frames: int = 12, size: tuple[int, int] = (96, 64)) -> Path:
    """One folder per class, each with videos of their own seeds."""
    for c in range(classes):
        for i in range(each):
            make_video(root / f"class {c}" / f"v{i}.mp4", frames=frames, size=size, seed=100 * c + i)
    return root
