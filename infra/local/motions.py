"""Short videos in which the class is the motion, for the demonstration and the tests.

A shape moves over a still background: left, right, up, down, or on an arc over the top, clockwise or counter-clockwise.
Every class is another one played backwards, and shape, colour, size, background, start and speed are random, so that
neither a single frame nor a set of frames without order tells left from right, up from down, or one turn from the other.
Objects leave one edge and enter at the other.
"""

from __future__ import annotations

import csv
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from data_prep.encode import STABLE_CODE

MOTIONS = ("clockwise", "counter-clockwise", "down", "left", "right", "up")
SHAPES = ("circle", "cross", "square", "triangle")
SIZE, FRAMES, FPS = 64, 24, 12


def path_of(motion: str, rng: np.random.Generator) -> NDArray[np.float64]:
    """Centres of the object, float64 [FRAMES, 2] as (x, y) in pixels, y downwards."""
    t = np.arange(FRAMES)[:, None]
    start = rng.uniform(0, SIZE, 2)
    if motion in ("left", "right", "up", "down"):
        direction = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[motion]
        return np.asarray((start + t * rng.uniform(2.0, 4.0) * np.array(direction)) % SIZE)
    turn = (1 if motion == "clockwise" else -1) * 2 * np.pi * rng.uniform(0.6, 0.9) / FRAMES
    angle = np.deg2rad(rng.uniform(-150, -30)) + turn * (t - (FRAMES - 1) / 2)  # the middle of the arc: -90 is its top
    return np.asarray((start + rng.uniform(12, 18) * np.concatenate([np.cos(angle), np.sin(angle)], 1)) % SIZE)


def mask_of(shape: str, dx: NDArray[np.float64], dy: NDArray[np.float64], radius: float) -> NDArray[np.float64]:
    """Cover of each pixel in [0, 1], given its offset from the object's centre."""
    if shape == "circle":
        distance = np.hypot(dx, dy) - radius
    elif shape == "square":
        distance = np.maximum(abs(dx), abs(dy)) - 0.9 * radius
    elif shape == "cross":
        arms = np.minimum(abs(dx), abs(dy)) - 0.4 * radius
        distance = np.maximum(arms, np.maximum(abs(dx), abs(dy)) - 1.1 * radius)
    else:
        distance = np.maximum(0.87 * abs(dx) + 0.5 * dy, -dy) - 0.7 * radius
    return np.clip(0.5 - distance, 0, 1)


def render(motion: str, shape: str, rng: np.random.Generator) -> NDArray[np.uint8]:
    """One video, uint8 [FRAMES, SIZE, SIZE, 3]."""
    low = rng.uniform(0, 1, (4, 4, 3))
    background = np.kron(low, np.ones((SIZE // 4, SIZE // 4, 1))) * rng.uniform(10, 60) + rng.uniform(0, 40, 3)
    colour = rng.uniform(60, 255, 3)
    colour[rng.integers(3)] = 255  # never as dark as the background can be
    radius = rng.uniform(8, 12)
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float64)
    half = SIZE / 2
    frames = []
    for cx, cy in path_of(motion, rng):
        dx, dy = (x - cx + half) % SIZE - half, (y - cy + half) % SIZE - half
        cover = mask_of(shape, dx, dy, radius)[..., None]
        frames.append(background * (1 - cover) + colour * cover)
    return np.stack(frames).clip(0, 255).astype(np.uint8)


def write_video(path: Path, frames: NDArray[np.uint8]) -> None:
    """Encode uint8 [T, H, W, 3] as h264."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "18", "preset": "veryfast", **STABLE_CODE})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.codec_context.thread_count = 1
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def make_video(folder: Path, number: int, seed: int) -> dict[str, str]:
    """Render one clip below `folder`; its row of the index."""
    rng = np.random.default_rng([seed, number])
    motion, shape = MOTIONS[number % len(MOTIONS)], str(rng.choice(SHAPES))
    name = f"{motion}/{number:05d}.mp4"
    write_video(folder / name, render(motion, shape, rng))
    return {"path": name, "label": motion, "shape": shape}


def make_dataset(folder: Path, videos: int, seed: int, processes: int = 1) -> Path:
    """Render `videos` clips below `folder`, the classes in turn, with `index.csv` (path, label, shape).

    The same seed gives the same files. Returns the folder.
    """
    for motion in MOTIONS:
        (folder / motion).mkdir(parents=True, exist_ok=True)
    one = partial(make_video, folder, seed=seed)
    if processes > 1:
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            rows = list(pool.map(one, range(videos), chunksize=8))
    else:
        rows = [one(number) for number in range(videos)]
    with open(folder / "index.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=["path", "label", "shape"])
        writer.writeheader()
        writer.writerows(rows)
    return folder
