"""The most probable classes of video files, by a registered model or a model folder.

Shapes: N videos, V views (clips x crops), T frames, S pixels, K classes, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from vswin_dist import storage
from vswin_dist.data.clips import video_views
from vswin_dist.data.transforms.normalise import normalise
from vswin_dist.data.video.decode import Limits, video_info
from vswin_dist.errors import CheckpointError, DataError
from vswin_dist.model_card import ModelCard, read_card
from vswin_dist.models import VideoSwin
from vswin_dist.models.weights.portable import load_model
from vswin_dist.serving.sources import CONTENT, name_of, read_video
from vswin_dist.tracking import Registry, is_reference, tracking_uri

# a video, see `sources` -> uint8 [V, 3, T, S, S], or planes [V, T, S * S * 3 / 2] (as a model of pixel_format yuv gets them)
Views = Callable[[object], Tensor]
UNTRAINED = "the model has no class names: its head was not trained"


@dataclass(frozen=True)
class Prediction:
    """The best classes of one video, most probable first."""

    video: str
    top: tuple[tuple[str, float], ...]  # (class name, probability)


class Predictor:
    """A model with all that turns a video file into class probabilities."""

    def __init__(
        self,
        model: nn.Module,
        card: ModelCard,
        *,
        clips: int = 1,
        crops: int = 1,
        batch: int = 8,
        device: str | torch.device = "cpu",
        views: Views | None = None,
    ) -> None:
        """`clips` x `crops` views of a video, their probabilities averaged; `batch` views go in one forward pass.

        `views` replaces the reading and cutting of videos.

        Raises:
            CheckpointError: the model was registered untrained, as an inflated one.
        """
        if not card.classes:
            raise CheckpointError(UNTRAINED)
        self.model, self.card, self.batch, self.device = model.to(device).eval(), card, batch, torch.device(device)
        self._data = card.data_settings()
        self._views = views or (lambda video: file_views(video, card, clips, crops))

    def views(self, video: object) -> Tensor:
        """Cut the views of a video: a path or URL, base64 or bytes; see `sources.read_video`.

        Raises:
            DataError: it is absent or cannot be decoded; names it.
            StorageError: it cannot be read.
        """
        return self._views(video)

    @torch.inference_mode()
    def scores(self, views: Sequence[Tensor]) -> Tensor:
        """Give the probabilities float32 [N, K] of N videos of V views each, the means of their views' softmax."""
        return self._mean_over_views(views, lambda clips: self.model(clips).float().softmax(1))

    @torch.inference_mode()
    def scores_and_features(self, views: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Give `scores`, and float32 [N, C]: the means of the last stage's features over views and places."""
        model = self.model
        assert isinstance(model, VideoSwin)

        def both(clips: Tensor) -> Tensor:
            pooled = model.forward_features(clips).flatten(2).mean(2)
            return torch.cat((model.head(pooled).float().softmax(1), pooled.float()), 1)

        found = self._mean_over_views(views, both)
        return found[:, : len(self.card.classes)], found[:, len(self.card.classes) :]

    def _mean_over_views(self, views: Sequence[Tensor], forward: Callable[[Tensor], Tensor]) -> Tensor:
        """Average what `forward` makes of clips over the views of each video; those of all videos share its passes."""
        data, found = self._data, []
        for part in torch.cat(list(views)).split(self.batch):
            clips = normalise(part.to(self.device), data.mean, data.std, torch.float32)
            found.append(forward(clips).cpu())
        means: Tensor = torch.cat(found).unflatten(0, (len(views), -1)).mean(1)
        return means

    def probabilities(self, video: object) -> Tensor:
        """Give the probabilities float32 [K] of one video; raises as `views` does."""
        return self.scores([self.views(video)])[0]

    def best(self, scores: Tensor, top: int = 5) -> tuple[tuple[str, float], ...]:
        """Name the most probable of `scores` [K]: (class, probability), the most probable first."""
        values, ids = scores.topk(min(top, len(self.card.classes)))
        return tuple(zip((self.card.classes[i] for i in ids.tolist()), values.tolist(), strict=True))

    def predict(self, videos: Iterable[str], top: int = 5) -> Iterator[Prediction]:
        """One prediction for each of `videos`, as soon as it is known; raises as `views` does."""
        for video in videos:
            yield Prediction(video, self.best(self.probabilities(video), top))


def check_videos(videos: Iterable[str]) -> None:
    """Refuse `videos` of which one is absent, before any is predicted.

    Raises:
        DataError: names the first.
        StorageError: it cannot be looked for.
    """
    for video in videos:
        if not storage.exists(storage.absolute(video)):
            raise DataError(f"no video at {video}")


def file_views(video: object, card: ModelCard, clips: int, crops: int, limits: Limits = Limits()) -> Tensor:  # noqa: B008
    """Cut the test views of a video, see `read_video`: uint8 [clips * crops, 3, T, S, S], or planes
    [clips * crops, T, S * S * 3 / 2] where the card's pixel_format is yuv.

    Raises:
        DataError: it is absent, cannot be decoded or exceeds `limits`; names it.
        StorageError: it cannot be read.
    """
    data = read_video(video)
    return video_views(data, video_info(data, name_of(video) or CONTENT, limits), card.data_settings(), clips, crops)


def find_model(model: str, uri: str | None) -> tuple[str, str]:
    """Find what `model` means now, and the store that knows it; an alias becomes the version that has it.

    Raises:
        CheckpointError: there is no such model, or it was never trained.
        ConfigError: no such reference, or there is no registry.
        TrackingError: the store is away.
    """
    registry = Registry(tracking_uri(uri))
    found = registry.find(model).uri if is_reference(model) else storage.absolute(model)
    if not read_card(registry.folder(found)).classes:
        raise CheckpointError(UNTRAINED)
    return found, registry.uri


def load_predictor(
    model: str,
    *,
    uri: str | None = None,
    clips: int = 1,
    crops: int = 1,
    batch: int = 8,
    device: str = "cpu",
    limits: Limits = Limits(),  # noqa: B008 - a tuple
) -> Predictor:
    """Load a predictor for `models:/NAME@ALIAS`, `models:/NAME/3`, or a model folder on any fsspec URL.

    Args:
        uri: the MLflow store of a registered model; see `vswin_dist.tracking.tracking_uri`.
        limits: of the videos.

    Raises:
        CheckpointError: there is no such model, or it cannot be used.
    """
    network, card = load_model(Registry(tracking_uri(uri)).folder(model))
    views = partial(file_views, card=card, clips=clips, crops=crops, limits=limits)
    return Predictor(network, card, batch=batch, device=device, views=views)
