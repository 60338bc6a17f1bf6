from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from vswin_dist import models
from vswin_dist.config.schema import DataSettings
from vswin_dist.model_card import preprocessing_of
from vswin_dist.models.weights.portable import write_model

DATA = DataSettings(train="x", sampling="dense", frames=4, stride=2, size=32, short_side=40)
CLASSES = ["left", "right", "up"]


@pytest.fixture(scope="session")
def network() -> models.VideoSwin:
    """A small real model with random weights."""
    return models.build_model("swin_nano", num_classes=len(CLASSES)).eval()


@pytest.fixture
def folder(network: models.VideoSwin, tmp_path: Path) -> str:
    """Its portable files."""
    return write_model(
        str(tmp_path / "model"), network, classes=CLASSES, preprocessing=preprocessing_of(DATA), lineage={"step": 7}
    )


@pytest.fixture(scope="session")
def video(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twelve frames of 64 x 48 pixels."""
    path = tmp_path_factory.mktemp("videos") / "clip.mp4"
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=12)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(12):
            picture = np.kron(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return str(path)
