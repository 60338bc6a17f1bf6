from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vswin_dist.data.transforms.normalise import normalise
from vswin_dist.data.video.decode import Limits
from vswin_dist.errors import CheckpointError, DataError
from vswin_dist.models import VideoSwin
from vswin_dist.models.weights.portable import load_model
from vswin_dist.serving.predict import Predictor, file_views, load_predictor


def test_probabilities_are_the_mean_of_the_views_softmax(folder: str, network: nn.Module, video: str) -> None:
    predictor = load_predictor(folder, clips=2, crops=3, batch=4)  # 6 views in passes of 4 and 2
    views = file_views(video, predictor.card, 2, 3)
    assert views.shape == (6, 3, 4, 32, 32) and views.dtype == torch.uint8
    data = predictor.card.data_settings()
    with torch.no_grad():
        logits = network(normalise(views, data.mean, data.std, torch.float32))
    expected = logits.softmax(1).mean(0)
    torch.testing.assert_close(predictor.probabilities(video), expected)
    assert (logits.mean(0).softmax(0) - expected).abs().max() > 0


def test_the_best_classes_come_first_and_no_more_than_there_are(folder: str, video: str) -> None:
    predictor = load_predictor(folder)
    (found,) = predictor.predict([video])
    values = [p for _, p in found.top]
    assert found.video == video
    assert sorted(n for n, _ in found.top) == ["left", "right", "up"]
    assert values == sorted(values, reverse=True) and sum(values) == pytest.approx(1)
    (one,) = predictor.predict([video], top=1)
    assert one.top == found.top[:1]


def test_views_can_come_from_elsewhere(folder: str) -> None:
    model, card = load_model(folder)
    asked: list[str] = []

    def views(video: object) -> Tensor:
        asked.append(str(video))
        return torch.zeros(1, 3, 4, 32, 32, dtype=torch.uint8)

    assert [p.video for p in Predictor(model, card, views=views).predict(["a", "b"])] == ["a", "b"]
    assert asked == ["a", "b"]


def test_videos_scored_together_score_as_alone_and_have_features(folder: str, network: VideoSwin, video: str) -> None:
    predictor = load_predictor(folder, clips=2, crops=1, batch=3)  # 6 views in two passes
    views = [predictor.views(video), predictor.views(Path(video).read_bytes()).flip(2), predictor.views(video)]
    scores, features = predictor.scores_and_features(views)
    torch.testing.assert_close(scores, torch.stack([predictor.scores([v])[0] for v in views]))
    torch.testing.assert_close(scores, predictor.scores(views))
    data = predictor.card.data_settings()
    with torch.no_grad():
        maps = network.forward_features(normalise(torch.cat(views), data.mean, data.std, torch.float32))
    torch.testing.assert_close(features, maps.mean((2, 3, 4)).view(3, 2, -1).mean(1))
    assert (features[0] - features[1]).abs().max() > 1e-6 and torch.equal(features[0], features[2])


def test_a_video_that_exceeds_the_limits_is_refused(folder: str, video: str) -> None:
    for limits, why in (
        (Limits(pixels=64 * 48 - 1), "frames of 64 x 48 have more than 3,071 pixels"),
        (Limits(seconds=0), "0 s"),
    ):
        with pytest.raises(DataError, match=rf"clip\.mp4: .*{why}"):
            load_predictor(folder, limits=limits).views(video)
    assert load_predictor(folder, limits=Limits(60, 64 * 48)).views(video).shape[0] == 1


def test_a_file_that_cannot_be_decoded_is_named(folder: str, tmp_path: Path) -> None:
    predictor = load_predictor(folder)
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"not a video" * 100)
    with pytest.raises(DataError, match=r"bad\.mp4: cannot be decoded"):
        predictor.probabilities(str(bad))
    with pytest.raises(DataError, match=r"no video at .*absent\.mp4"):
        predictor.probabilities(str(tmp_path / "absent.mp4"))
    with pytest.raises(DataError, match="is a folder: name the video files"):
        predictor.probabilities(str(tmp_path))


def test_a_model_without_class_names_is_refused(folder: str) -> None:
    model, card = load_model(folder)
    with pytest.raises(CheckpointError, match="its head was not trained"):
        Predictor(model, replace(card, classes=[]))
