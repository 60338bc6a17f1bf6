"""Which version is champion: decided by hand-made predictions of known scores, in a real store."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.mlflow_store import new_store
from vswin_dist import model_card, storage
from vswin_dist.errors import CheckpointError, ConfigError, DataError, WorkFailed
from vswin_dist.evaluation import report
from vswin_dist.evaluation.analysis import analyse
from vswin_dist.evaluation.compare import compare
from vswin_dist.evaluation.evaluate import Views
from vswin_dist.evaluation.history import EXPERIMENT, evaluations, with_evaluations
from vswin_dist.evaluation.launch import Evaluation
from vswin_dist.evaluation.metrics import score
from vswin_dist.evaluation.options import Asked
from vswin_dist.evaluation.predictions import Found, Identity, Predictions
from vswin_dist.evaluation.promotion import Contest, decide, enact, find_contest, scored
from vswin_dist.manifest import Manifest, Sample, Shard, write_manifest
from vswin_dist.tracking import Registry, backend, finished_runs

N = 40
CLASSES = ["left", "right"]
LABELS = np.arange(N) % 2
SAMPLES = [Sample(f"v{i}", i % 2, 0, i, 1, 0, "mp4", 9, 1.0, 9.0, 8, 8, "") for i in range(N)]
SET = Manifest("motions", "val", CLASSES, {}, [Shard("0.tar", 1, "", N)], SAMPLES, [], N)
IDENTITY = Identity("w", "c", SET.fingerprint, "motions val", CLASSES, 4, 3, 8, False, "cpu", "2")
PYFUNC = Path(__file__).parents[2] / "support" / "no_model.py"


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A real store."""
    return new_store(tmp_path_factory.mktemp("mlflow") / "mlflow.db")


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """Where the manifest of the set is; its videos are never read."""
    write_manifest(SET, str(tmp_path / "shards"))
    return str(tmp_path / "shards")


@pytest.fixture
def register(uri: str, tmp_path: Path) -> Callable[..., str]:
    """Register a model as a training does."""
    url = f"memory://promotion/{tmp_path.name}"
    storage.put_bytes(f"{url}/{model_card.WEIGHTS}", b"weights")
    storage.put_bytes(f"{url}/{model_card.CARD}", json.dumps({"settings": {}}).encode())
    how = {"pyfunc": PYFUNC, "alias": "candidate", "description": "My words."}
    return lambda **tags: Registry(uri).register(tmp_path.name, url, tags={"training_run": "r", **tags}, **how)


def predictions(right: int, identity: Identity = IDENTITY, lost: tuple[int, ...] = ()) -> Predictions:
    """Of the first `right` videos the true class is the best one."""
    kept = np.array([i for i in range(N) if i not in lost])
    truth = np.where(kept < right, LABELS[kept], 1 - LABELS[kept])
    found = Found(kept, LABELS[kept], np.where(np.arange(2) == truth[:, None], 0.75, 0.25), [(i, "gone") for i in lost])
    return Predictions(identity, found, [f"v{i}" for i in kept], [(f"v{i}", "gone") for i in lost])


def log(uri: str, model: str, shards: str, found: Predictions, top: int | None = None) -> str:
    """Log an evaluation as `jobs/evaluate.py` does, of predictions that only the run has."""
    f, identity = found.found, found.identity
    evaluation = Evaluation(score(f.probabilities, f.labels, found.missing), found, "/nowhere/predictions.parquet")
    views = Views(identity.clips, identity.crops, identity.batch, identity.shuffle_frames)
    analysis = analyse(f.probabilities, f.labels, CLASSES)
    return report.log(report.find_model(model, uri, None), shards, views, evaluation, analysis, ranks=1, top=top)


def asked(uri: str, **changes: object) -> Asked:
    return replace(Asked(None, None, None, 8, 0, 1, False, None, uri, None), **changes)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("champion", "candidate", "margin", "certain", "moves"),
    [
        (20, 21, 0.0, False, True),
        (20, 20, 0.0, False, False),
        (21, 20, 0.0, False, False),
        (20, 21, 2.5, False, False),  # of 40 videos, one is 2.5 points
        (20, 22, 2.5, False, True),
        (20, 21, 0.0, True, False),
        (20, 30, 0.0, True, True),
        (21, 20, -3.0, False, True),
    ],
)
def test_the_margin_must_be_exceeded(champion: int, candidate: int, margin: float, certain: bool, moves: bool) -> None:
    sides = predictions(champion), predictions(candidate)
    decision = decide(compare(("A", "B"), *sides), sides, margin, certain)
    assert decision.moves == moves
    points = 2.5 * (candidate - champion)
    assert f"top-1 {2.5 * candidate:.2f} against {2.5 * champion:.2f} ({points:+.2f}, 95% interval " in decision.why
    assert f"{'' if moves else 'not '}above the margin of {margin:g} points" in decision.why


def test_videos_that_one_of_them_alone_has_scored_decide_nothing() -> None:
    sides = predictions(10), predictions(30, lost=(7,))
    decision = decide(compare(("A", "B"), *sides), sides, 0.0)
    assert not decision.moves and "1 videos were scored with one of them alone, first 'v7'" in decision.why
    both = predictions(10, lost=(7,)), predictions(30, lost=(7,))
    assert decide(compare(("A", "B"), *both), both, 0.0).moves


@pytest.mark.slow
def test_a_better_candidate_becomes_champion_by_what_is_logged(
    uri: str, register: Callable[..., str], shards: str, tmp_path: Path
) -> None:
    """The newest evaluations of one set and of the same views count; controls, other views and halves do not."""
    name, first, second = tmp_path.name, register(), register()
    log(uri, first, shards, predictions(40, replace(IDENTITY, shuffle_frames=True)))
    log(uri, second, shards, predictions(0, replace(IDENTITY, shuffle_frames=True)))
    log(uri, first, shards, predictions(40, replace(IDENTITY, clips=1)))
    log(uri, first, shards, predictions(20))
    contest = find_contest(name, asked(uri))
    assert contest.champion and (contest.champion.uri, contest.candidate.uri) == (first, second)
    with pytest.raises(ConfigError, match=rf"{second}: none\): name the shards to score both on in --data"):
        scored(contest, asked(uri))
    log(uri, second, shards, predictions(30), top=1)
    with pytest.raises(ConfigError, match="name the shards to score both on"):
        scored(contest, asked(uri))
    log(uri, second, shards, predictions(30))
    with pytest.raises(ConfigError, match="name the shards to score both on"):
        scored(contest, asked(uri, clips=1))
    sides = scored(contest, asked(uri))
    decision = decide(compare((first, second), *sides), sides, 0.0)
    assert [int((p.found.probabilities.argmax(1) == p.found.labels).sum()) for p in sides] == [20, 30] and decision.moves
    enact(contest, decision, asked(uri), promotion_run="p")

    registry = Registry(uri)
    assert registry.aliases(name) == {"champion": 2, "candidate": 2}
    new, old = registry.find(second).tags, registry.find(first).tags
    assert new["promoted_over"] == first and old["replaced_by"] == second
    assert new["promoted_because"] == old["replaced_because"] == decision.why and "75.00 against 50.00" in decision.why
    assert new["promoted_at"] == old["replaced_at"] and new["promotion_run"] == old["promotion_run"] == "p"
    settled = find_contest(name, asked(uri)).settled
    assert settled and not settled.moves and settled.why == "it is the candidate, too"


@pytest.mark.slow
def test_what_needs_no_scores(uri: str, register: Callable[..., str], tmp_path: Path) -> None:
    name, registry = tmp_path.name, Registry(uri)
    with pytest.raises(CheckpointError, match=f"models:/{name}@candidate does not exist"):
        find_contest(name, asked(uri))
    register()
    backend.client(uri).delete_registered_model_alias(name, "champion")
    contest = find_contest(name, asked(uri))
    assert contest.settled and contest.settled.moves and contest.settled.why == f"{name} had no champion"
    enact(contest, contest.settled, asked(uri))
    assert registry.aliases(name) == {"champion": 1, "candidate": 1}
    flat = replace(registry.find(f"models:/{name}/1"), version=9, tags={"inflated_from": "a.pth"})
    settled = Contest(contest.candidate, flat).settled
    assert settled and settled.moves and "before any training" in settled.why
    with pytest.raises(ConfigError, match="has no registry"):
        find_contest(name, asked("none"))


def test_aliases_that_moved_meanwhile_are_left(uri: str, register: Callable[..., str], tmp_path: Path) -> None:
    name = tmp_path.name
    register()
    register()
    contest, sides = find_contest(name, asked(uri)), (predictions(20), predictions(30))
    decision = decide(compare(("A", "B"), *sides), sides, 0.0)
    register()  # another training ends while both are scored
    with pytest.raises(WorkFailed, match=r"moved meanwhile \(candidate 3, champion 1\): nothing was changed"):
        enact(contest, decision, asked(uri))
    assert Registry(uri).aliases(name) == {"champion": 1, "candidate": 3}
    assert "replaced_by" not in Registry(uri).find(f"models:/{name}/1").tags


@pytest.mark.slow
def test_models_of_other_classes_cannot_replace_each_other(
    uri: str, register: Callable[..., str], shards: str, tmp_path: Path
) -> None:
    first, second = register(), register()
    log(uri, first, shards, predictions(20))
    log(uri, second, shards, predictions(20, replace(IDENTITY, classes=["left", "up"])))
    with pytest.raises(DataError, match="tell other classes apart: 2 against 2, first 'right' against 'up'"):
        scored(find_contest(tmp_path.name, asked(uri)), asked(uri))


@pytest.mark.slow
def test_evaluations_stand_in_the_description_and_runs_say_what_they_are(
    uri: str, register: Callable[..., str], shards: str
) -> None:
    model = register()
    runs = [log(uri, model, shards, predictions(right)) for right in (10, 20)]
    runs.append(log(uri, model, shards, predictions(5, replace(IDENTITY, shuffle_frames=True))))
    text = Registry(uri).find(model).description
    assert text.startswith("My words.\n\n## Evaluations\n\n| data |") and runs[0] not in text, "the newest of one kind"
    rows = {line.rpartition("| ")[2].removesuffix(" |"): line for line in text.splitlines() if "motions val" in line}
    assert list(rows) == [runs[1], runs[2]], "a control stands below what it controls"
    assert f"| motions val `{SET.fingerprint[:8]}` | 4 x 3 | 50.00 (" in rows[runs[1]]
    assert "| 4 x 3, frames in random order | 12.50 (" in rows[runs[2]]
    found = finished_runs(uri, EXPERIMENT, {"model": model})
    assert [r.tags["kind"] for r in found] == ["control", "evaluation", "evaluation"]
    assert len({r.name for r in found}) == 2 and "frames in random order" in found[0].name
    assert [e.shuffled for e in evaluations(uri, model)] == [True, False, False]
    linked = backend.client(uri).get_logged_model(str(Registry(uri).find(model).model_id)).metrics
    assert {(m.run_id, m.value) for m in linked if m.key == "test/top1"} == {(runs[0], 25.0), (runs[1], 50.0)}


def test_what_people_write_around_the_table_stays() -> None:
    once = with_evaluations("# Mine\n\nText.\n", ["| a |"])
    edited = once + "\nA note.\n\n## More\n\n| my | table |\n"
    again = with_evaluations(edited, ["| b |", "| c |"])
    assert "| a |" not in again and again.count("## Evaluations") == 1
    assert again.startswith("# Mine\n\nText.\n\n## Evaluations\n") and again.endswith(
        "| b |\n| c |\n\nA note.\n\n## More\n\n| my | table |\n"
    )
    assert with_evaluations("", ["| a |"]).startswith("## Evaluations\n")
