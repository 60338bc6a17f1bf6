"""One model's predictions by any number of ranks and after a kill in the middle, the same to the last digit."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import run_ranks
from tests.support.s3_server import S3Server
from tests.support.shards import with_corrupt_videos, with_damaged_storage
from vswin_dist import storage
from vswin_dist.config.schema import DataSettings
from vswin_dist.data.clips import info_of, video_views
from vswin_dist.data.plan import evaluation_batches
from vswin_dist.data.transforms.normalise import normalise
from vswin_dist.device import Rank
from vswin_dist.errors import DataError, WorkFailed
from vswin_dist.evaluation import predictions
from vswin_dist.evaluation.evaluate import Scorer, Views
from vswin_dist.evaluation.launch import Request, collect, identify, score, score_on_rank
from vswin_dist.evaluation.predictions import Store
from vswin_dist.manifest import read_manifest
from vswin_dist.model_card import preprocessing_of
from vswin_dist.models import build_model
from vswin_dist.models.weights.portable import load_model, write_model

VIEWS = Views(2, 3, 12)  # two videos at a time


@pytest.fixture(scope="module")
def request_of_val(motion_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Request:
    """A model that tells the motions apart by nothing but chance, on twelve videos."""
    val = f"{motion_shards}/val"
    data = DataSettings(train=val, sampling="dense", frames=8, stride=1, size=32, short_side=36)
    torch.manual_seed(0)
    classes = read_manifest(val).classes
    model = build_model("swin_nano", num_classes=len(classes))
    with torch.no_grad():
        model.head.weight.mul_(30)  # so that the classes differ
    folder = write_model(
        str(tmp_path_factory.mktemp("model")), model, classes=classes, preprocessing=preprocessing_of(data), lineage={}
    )
    return Request(folder, "none", val, VIEWS, workers=0, save_every_s=0)


@pytest.fixture(scope="module")
def alone(request_of_val: Request, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of predictions that one process writes."""
    return storage.read_bytes(score(request_of_val, 1, False, str(tmp_path_factory.mktemp("alone"))).url)


def store_at(root: Path | str, request: Request) -> Store:
    return Store.below(str(root), identify(request, read_manifest(request.data), use_gpu=False))


def finished(store: Store, request: Request) -> bytes:
    return storage.read_bytes(collect(store, read_manifest(request.data)).url)


def score_part(request: Request, store: Store) -> int:
    return score_on_rank(request, store, Rank(dist.get_rank(), dist.get_world_size(), torch.device("cpu")))


class MortalStore(Store):
    """One in which a rank is killed as it writes its second part: of the last one."""

    def add(self, found: predictions.Found, manifest: predictions.Manifest) -> None:
        super().add(found, manifest)
        if dist.get_rank() == 1 and found.indices[0] > 4:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_write_the_predictions_of_one_process(
    request_of_val: Request, alone: bytes, tmp_path: Path, ranks: int
) -> None:
    store = store_at(tmp_path, request_of_val)
    assert sum(run_ranks(ranks, score_part, request_of_val, store)) == 12
    assert finished(store, request_of_val) == alone
    assert os.listdir(store.url) == [predictions.ALL], "the parts are not needed any more"


def test_what_a_killed_rank_has_scored_is_kept(request_of_val: Request, alone: bytes, tmp_path: Path) -> None:
    store = store_at(tmp_path, request_of_val)
    with pytest.raises(AssertionError, match="rank 1 was killed by 9"):
        run_ranks(2, score_part, request_of_val, MortalStore(store.url, store.identity))
    with pytest.raises(WorkFailed, match=r"of 12 videos are not in .*--storage-root"):
        collect(store, read_manifest(request_of_val.data))
    kept = len(store.read().indices)
    assert 4 <= kept < 12
    assert sum(run_ranks(3, score_part, request_of_val, store)) == 12 - kept, "with another number of ranks"
    assert finished(store, request_of_val) == alone


def test_parts_in_object_storage_of_which_one_is_cut(
    request_of_val: Request,
    alone: bytes,
    object_store: S3Server,
    object_prefix: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, value in object_store.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", object_store.endpoint)
    store = store_at(object_prefix, request_of_val)
    score_on_rank(request_of_val, store, Rank(0, 1, torch.device("cpu")))
    names = storage.list_names(store.url)
    assert len(names) == 6 and all(name.startswith(predictions.PART) for name in names)
    whole = storage.read_bytes(cut := storage.join(store.url, names[2]))
    storage.put_bytes(cut, whole[: len(whole) - 200])
    with caplog.at_level(logging.WARNING):
        assert len(store.read().indices) == 10
        done = score(request_of_val, 1, False, object_prefix)
    assert names[2] in caplog.text and "scored again" in caplog.text
    assert storage.read_bytes(done.url) == alone and storage.list_names(store.url) == [predictions.ALL]


def test_what_is_scored_is_not_scored_again_unless_told(
    request_of_val: Request, alone: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for fresh in (False, False, True):
        done = score(request_of_val, 1, False, str(tmp_path), fresh=fresh)
        assert storage.read_bytes(done.url) == alone
        said.append(capsys.readouterr().out)
    assert "scoring 12 of 12 videos, 6 views of each, on 1 ranks" in said[0] and "12 of 12 videos, " in said[0]
    assert said[1] == "all 12 videos were scored before; jobs/evaluate.py --fresh scores them again\n"
    assert "scoring 12 of 12" in said[2]


def test_other_content_is_another_evaluation(request_of_val: Request, tmp_path: Path) -> None:
    """Each part of the key; a model that was moved is the same one."""
    moved = tmp_path / "moved"
    model, card = load_model(request_of_val.model)
    write_model(str(moved), model, classes=card.classes, preprocessing=card.preprocessing, lineage=card.lineage)
    with torch.no_grad():
        model.head.bias[0] += 1e-3
    trained = tmp_path / "trained"
    write_model(str(trained), model, classes=card.classes, preprocessing=card.preprocessing, lineage=card.lineage)
    ours = store_at(tmp_path, request_of_val).url
    assert store_at(tmp_path, dataclasses.replace(request_of_val, model=str(moved))).url == ours
    other = [
        dataclasses.replace(request_of_val, model=str(trained)),
        dataclasses.replace(request_of_val, data=request_of_val.data.replace("val", "train")),
        *(
            dataclasses.replace(request_of_val, views=dataclasses.replace(VIEWS, **change))
            for change in ({"clips": 3}, {"crops": 1}, {"batch": 6}, {"shuffle_frames": True})
        ),
    ]
    assert len({ours, *(store_at(tmp_path, r).url for r in other)}) == 1 + len(other)


def test_predictions_and_scores_are_those_of_a_plain_loop(request_of_val: Request, tmp_path: Path) -> None:
    done = score(request_of_val, 1, False, str(tmp_path))
    manifest = read_manifest(request_of_val.data)
    model, card = load_model(request_of_val.model)
    expected = []
    with torch.no_grad():
        for sample in manifest.samples:
            tar = Path(request_of_val.data, manifest.shards[sample.shard].url).read_bytes()
            video = tar[sample.offset : sample.offset + sample.size]
            views = video_views(video, info_of(sample), card.data_settings(), 2, 3)
            one_by_one = [model(normalise(v[None], *card_scale(card), torch.float32)).double().softmax(1) for v in views]
            expected.append(torch.cat(one_by_one).mean(0).numpy())
    p, labels = np.stack(expected), np.array([s.class_id for s in manifest.samples])
    table = pq.read_table(done.url).to_pydict()
    assert table["key"] == [s.key for s in manifest.samples] and table["class_id"] == labels.tolist()
    assert table["predicted"] == [manifest.classes[c] for c in p.argmax(1)]
    np.testing.assert_allclose(np.array(table["probabilities"]), p, atol=2e-6)
    assert done.scores.top1 == pytest.approx(100 * np.mean(p.argmax(1) == labels))
    assert done.scores.loss == pytest.approx(-np.log(p[np.arange(12), labels]).mean(), rel=1e-5)


def card_scale(card: object) -> tuple[tuple[float, ...], tuple[float, ...]]:
    data = card.data_settings()  # type: ignore[attr-defined]
    return data.mean, data.std


def test_a_video_that_does_not_decode_is_missing_and_changes_no_neighbour(
    request_of_val: Request, alone: bytes, tmp_path: Path, motion_shards: Path
) -> None:
    bad = tmp_path / "bad"
    with_corrupt_videos(motion_shards / "val", bad, [4, 11])
    done = score(dataclasses.replace(request_of_val, data=str(bad)), 1, False, str(tmp_path))
    assert [key for key, _ in done.scores.missing] == [read_manifest(str(bad)).samples[i].key for i in (4, 11)]
    assert (done.scores.expected, done.scores.scored) == (12, 10)
    table = pq.read_table(done.url).to_pydict()
    assert [i for i, reason in enumerate(table["missing"]) if reason] == [4, 11]
    assert table["probabilities"][4] is None and table["class_id"][4] is None
    (tmp_path / "alone.parquet").write_bytes(alone)
    whole = predictions.read(str(tmp_path / "alone.parquet")).found.probabilities
    assert np.array_equal(done.predictions.found.probabilities, np.delete(whole, [4, 11], axis=0)), "to the last digit"


def test_a_video_keeps_its_place_in_the_batch_beside_one_that_is_missing(tmp_path: Path, motion_shards: Path) -> None:
    """A model that says nothing but where in the batch each view is."""
    bad = tmp_path / "bad"
    with_corrupt_videos(motion_shards / "val", bad, [4])
    data = DataSettings(train=str(bad), sampling="dense", frames=4, size=32, short_side=32, workers=0)

    def forward(clips: torch.Tensor) -> torch.Tensor:
        assert len(clips) == 8
        return torch.nn.functional.pad(torch.arange(8.0)[:, None], (0, 5))

    answers = []
    for place in (motion_shards / "val", bad):
        manifest = read_manifest(str(place))
        scorer = Scorer(forward, manifest, str(place), data, Views(2, 1, 8), torch.device("cpu"), torch.float32)
        batches, rounds = evaluation_batches(12, 0, 1, 4)
        parts = list(scorer.rounds(batches, rounds))
        answers.append(predictions.Found.joined(parts, 6))
    assert answers[1].indices.tolist() == [i for i in range(12) if i != 4]
    assert np.array_equal(answers[1].probabilities, np.delete(answers[0].probabilities, 4, axis=0))
    assert len(np.unique(answers[0].probabilities[:, 0])) == 4


def test_a_missing_video_is_scored_once_the_storage_is_mended(
    request_of_val: Request, alone: bytes, tmp_path: Path, motion_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "damaged"
    with_damaged_storage(motion_shards / "val", place, 7)
    request = dataclasses.replace(request_of_val, data=str(place))
    [(_, why)] = score(request, 1, False, str(tmp_path)).scores.missing
    assert "run data-prep verify --repair" in why
    [shard] = place.glob("*.tar")
    shard.write_bytes((motion_shards / "val" / shard.name).read_bytes())
    done = score(request, 1, False, str(tmp_path))
    assert storage.read_bytes(done.url) == alone
    assert "scoring 2 of 12 videos, 6 views of each, on 1 ranks; 10 are scored already" in capsys.readouterr().out


def test_the_first_classes_alone(request_of_val: Request, alone: bytes, tmp_path: Path) -> None:
    path = tmp_path / "all.parquet"
    path.write_bytes(alone)
    whole = predictions.read(str(path))
    best = tmp_path / "best.parquet"
    best.write_bytes(whole.to_parquet(top=2))
    table = pq.read_table(best).to_pydict()
    for row, ids, values in zip(whole.found.probabilities, table["classes"], table["probabilities"], strict=True):
        assert ids == sorted(range(6), key=lambda c: -row[c])[:2] and values == row[ids].tolist()
    with pytest.raises(DataError, match=r"holds the first 2 classes of each video alone"):
        predictions.read(str(best))
    with pytest.raises(DataError, match=r"holds no predictions of this version, or is damaged"):
        predictions.read(str(next(Path(request_of_val.data).glob("*.parquet"))))
