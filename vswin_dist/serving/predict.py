"""The most probable classes of video files, by a registered model or a model folder.

Shapes: V views (clips x crops), T frames, S pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vswin_dist import storage
from vswin_dist.data.clips import video_views
from vswin_dist.data.decode import count_frames
from vswin_dist.data.transforms import normalise
from vswin_dist.errors import CheckpointError, DataError
from vswin_dist.serving.export import ModelCard, load_model
from vswin_dist.tracking.registry import is_reference, resolve_model
from vswin_dist.tracking.run import tracking_uri

# path or URL of a video -> uint8 [V, 3, T, S, S], or planes [V, T, S * S * 3 / 2] (as a model of pixel_format yuv gets them)
Views = Callable[[str], Tensor]


@dataclass(frozen=True)
class Prediction:
    """The best classes of one video, most probable first."""

    video: str
    top: tuple[tuple[str, float], ...]  # (class name, probability)


class Predictor:
    """A model with all that turns a video file into class probabilities."""

    def __init__(self, model: nn.Module, card: ModelCard, *, clips: int = 1, crops: int = 1, batch: int = 8,
                 device: str | torch.device = "cpu", views: Views | None = None) -> None:
        """`clips` x `crops` views of a video, their probabilities averaged; `batch` views go in one forward pass.

        `views` replaces the reading and cutting of videos.

        Raises:
            CheckpointError: the model was registered untrained, as an inflated one.
        """
        if not card.classes:
            raise CheckpointError("the model has no class names: its head was not trained")
        self.model, self.card, self.batch, self.device = model.to(device).eval(), card, batch, torch.device(device)
        self._data = card.data_settings()
        self._views = views or (lambda video: file_views(video, card, clips, crops))

    @torch.inference_mode()
    def probabilities(self, video: str) -> Tensor:
        """float32 [K], the mean over the views' softmax.

        Raises:
            DataError: the video is absent or cannot be decoded; names it.
        """
        views = self._views(video)
        total = torch.zeros(len(self.card.classes))
        for part in views.split(self.batch):
            clips = normalise(part.to(self.device), self._data.mean, self._data.std, torch.float32)
            total += self.model(clips).float().softmax(dim=1).sum(dim=0).cpu()
        return total / len(views)

    def predict(self, videos: Iterable[str], top: int = 5) -> Iterator[Prediction]:
        """One prediction for each of `videos`, as soon as it is known; raises as `probabilities` does."""
        for video in videos:
            values, ids = self.probabilities(video).topk(min(top, len(self.card.classes)))
            names = [self.card.classes[i] for i in ids.tolist()]
            yield Prediction(video, tuple(zip(names, values.tolist(), strict=True)))


def file_views(video: str, card: ModelCard, clips: int, crops: int) -> Tensor:
    """The test views of a video file on any fsspec URL: uint8 [clips * crops, 3, T, S, S], or planes
    [clips * crops, T, S * S * 3 / 2] where the card's pixel_format is yuv.

    Raises:
        DataError: it is absent or cannot be decoded; names it.
    """
    try:
        data = storage.read_bytes(storage.absolute(video))
    except FileNotFoundError as error:
        raise DataError(f"no video at {video}") from error
    except IsADirectoryError as error:
        raise DataError(f"{video} is a folder: name the video files") from error
    return video_views(data, *count_frames(data, video), video, card.data_settings(), clips, crops)


def load_predictor(model: str, *, uri: str | None = None, clips: int = 1, crops: int = 1, batch: int = 8,
                   device: str = "cpu") -> Predictor:
    """A predictor for ``models:/NAME@ALIAS``, ``models:/NAME/3``, or a model folder on any fsspec URL.

    Args:
        uri: the MLflow store of a registered model; see `vswin_dist.tracking.tracking_uri`.

    Raises:
        CheckpointError: there is no such model, or it cannot be used.
    """
    folder = resolve_model(tracking_uri(uri), model)[0] if is_reference(model) else model
    network, card = load_model(folder)
    return Predictor(network, card, clips=clips, crops=crops, batch=batch, device=device)
