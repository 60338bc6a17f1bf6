from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from vswin_dist.tracking import backend, metrics, run
from vswin_dist.tracking.metrics import MetricLogger


def history(store: str, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in backend.client(store).get_metric_history(run_id, name)]


class Refusal(Exception):
    error_code = "INVALID_PARAMETER_VALUE"


class FakeClient:
    """A store whose `log_batch` does what the test says; `rows` are what it has taken."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, int]] = []
        self.fail: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.calls = 0

    def get_run(self, run_id: str) -> Any:
        return SimpleNamespace(data=SimpleNamespace(to_proto=lambda: SimpleNamespace(metrics=[])))

    def log_batch(self, run_id: str, metrics: list[Any]) -> None:
        self.calls += 1
        self.gate.wait()
        if self.fail:
            raise self.fail
        self.rows += [(m.key, m.step) for m in metrics]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeClient]:
    client = FakeClient()
    monkeypatch.setattr(backend, "client", lambda uri: client)
    monkeypatch.setattr(metrics, "FIRST_WAIT_S", 0.01)
    yield client
    client.gate.set()


def wait_for_call(client: FakeClient, number: int = 1) -> None:
    deadline = time.monotonic() + 60
    while client.calls < number:
        assert time.monotonic() < deadline, "no request came"
        time.sleep(0.002)


@pytest.mark.slow
def test_values_arrive_in_a_real_store(store: str) -> None:
    run_id = run.open_run(store, "exp", "metrics").id
    logger = MetricLogger(store, run_id)
    for step in range(1200):
        logger.log(step, {"train/loss": 1 / (step + 1), "lr.backbone": 0.1})
    logger.log(1200, {"train/loss": math.nan})
    assert logger.close() == 0
    found = history(store, run_id, "train/loss")
    assert found[:-1] == [(s, 1 / (s + 1)) for s in range(1200)]
    assert found[-1][0] == 1200 and math.isnan(found[-1][1])
    assert len(history(store, run_id, "lr.backbone")) == 1200


def test_steps_never_repeat_after_a_training_went_back(store: str) -> None:
    run_id = run.open_run(store, "exp", "restarts").id
    for first, last in ((0, 10), (6, 15), (3, 12)):  # a crash at 9, back to 6; again at 14, back to 3
        logger = MetricLogger(store, run_id)
        for step in range(first, last):
            logger.log(step, {"loss": first + step})
            if step % 5 == 4:
                logger.log(step, {"top1": step, "top1_ema": step})
        assert logger.close() == 0
    assert [s for s, _ in history(store, run_id, "loss")] == list(range(15))
    assert dict(history(store, run_id, "loss"))[8] == 8  # the first value stays
    assert [s for s, _ in history(store, run_id, "top1")] == [4, 9, 14]


def test_a_request_that_was_answered_too_late_does_not_double_its_values(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "FIRST_WAIT_S", 0.01)
    run_id = run.open_run(store, "exp", "late").id
    client = backend.client(store)
    write, calls = client.log_batch, []

    def late(*args: Any, **kwargs: Any) -> None:
        write(*args, **kwargs)
        calls.append(1)
        if len(calls) < 3:
            raise TimeoutError("Read timed out")

    monkeypatch.setattr(client, "log_batch", late)
    logger = MetricLogger(store, run_id)
    logger.log(1, {"loss": 0.5, "diverged": math.nan})
    assert logger.close() == 0
    assert len(calls) == 1, "the store was not asked what it has"
    write(run_id, metrics=[backend.metric("loss", 0.5, 7, 2)])
    write(run_id, metrics=[backend.metric("loss", 0.5, 7, 2)])  # as of a request that came after that
    assert sorted(history(store, run_id, "loss")) == [(1, 0.5), (2, 0.5)]
    assert [s for s, _ in history(store, run_id, "diverged")] == [1]


def test_a_step_given_twice_is_sent_once(fake: FakeClient) -> None:
    logger = MetricLogger("x", "r")
    logger.log(1, {"a": 1})
    logger.log(1, {"a": 2, "b": 1})
    logger.log(0, {"a": 3})
    logger.log(2, {"a": 1})
    assert logger.close() == 0
    assert fake.rows == [("a", 1), ("b", 1), ("a", 2)]


def test_a_store_that_hangs_holds_nothing_up_and_loses_only_the_oldest(
    fake: FakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    fake.gate.clear()
    logger = MetricLogger("x", "r", capacity=50)
    logger.log(0, {"a": 0})
    wait_for_call(fake)
    for step in range(1, 101):  # would never end if it waited for the store
        logger.log(step, {"a": step})
    assert not logger.flush(timeout_s=0.05)
    fake.gate.set()
    assert logger.flush(timeout_s=60)
    assert logger.close() == 50
    assert [s for _, s in fake.rows] == [0, *range(51, 101)]
    assert "50 metric values of run r were not taken and are lost" in caplog.text


def test_a_store_that_was_away_gets_everything_and_is_reported_once(
    fake: FakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    fake.fail = ConnectionError("Connection refused")
    logger = MetricLogger("http://u:pw@host/x", "r")
    for step in range(20):
        logger.log(step, {"a": step})
        wait_for_call(fake, step // 5 + 1)
    fake.fail = None
    assert logger.flush(timeout_s=60)
    assert logger.close() == 0
    assert [s for _, s in fake.rows] == list(range(20))
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert warnings[0].getMessage().startswith("MLflow at http://host/x does not take metrics of run r (connection refused)")


def test_close_gives_up_after_its_timeout_and_counts(fake: FakeClient, caplog: pytest.LogCaptureFixture) -> None:
    fake.fail = ConnectionError("no route")
    logger = MetricLogger("x", "r")
    logger.log(0, {"a": 1, "b": 2})
    assert logger.close(timeout_s=0.1) == 2
    assert "2 metric values of run r" in caplog.text
    logger._thread.join(60)
    assert not logger._thread.is_alive()


def test_what_the_store_refuses_for_good_is_dropped_and_the_rest_goes_on(fake: FakeClient) -> None:
    fake.fail = Refusal("bad")
    logger = MetricLogger("x", "r")
    logger.log(0, {"a": 1})
    wait_for_call(fake)
    assert logger.flush(timeout_s=60)
    fake.fail = None
    logger.log(1, {"a": 1})
    assert logger.close() == 1
    assert fake.rows == [("a", 1)]
    assert fake.calls == 2


def test_names_that_mlflow_refuses_are_an_error_at_the_call(fake: FakeClient) -> None:
    logger = MetricLogger("x", "r")
    with pytest.raises(ValueError, match="'lr@head': only letters"):
        logger.log(0, {"lr@head": 1.0})
    with pytest.raises(ValueError, match="step -1 is negative"):
        logger.log(-1, {"a": 1.0})
    assert logger.close() == 0 and fake.rows == []


def test_only_the_senders_own_retries_are_silenced(fake: FakeClient, caplog: pytest.LogCaptureFixture) -> None:
    MetricLogger("x", "r").close()
    library = logging.getLogger("urllib3.connectionpool")
    sender = threading.Thread(target=lambda: library.warning("from the sender"), name=metrics.THREAD_NAME)
    sender.start()
    sender.join()
    library.warning("from elsewhere")
    assert [r.getMessage() for r in caplog.records] == ["from elsewhere"]
