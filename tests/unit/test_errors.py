"""What commands refuse of their own options, and how an error's meaning depends on whether the work had begun."""

from __future__ import annotations

import pickle

import pytest

from vswin_dist.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    PreflightError,
    RanksFailed,
    StorageError,
    TrackingError,
    VswinError,
    WorkFailed,
    after_start,
    at_least,
    before_start,
    run_command,
)

RESUME = "The same command resumes."


def test_options_below_their_least_value_are_named() -> None:
    at_least(1, clips=1, crops=3)
    at_least(0, workers=0)
    with pytest.raises(ConfigError, match=r"^--crops=0: must be 1 or more$"):
        at_least(1, clips=4, crops=0)


@pytest.mark.parametrize("error", [StorageError("s3 is away", errno=5), TrackingError("MLflow is away")])
def test_what_is_away_before_the_start_is_bad_input(error: VswinError) -> None:
    assert error.exit_code == 1
    with pytest.raises(PreflightError, match=r"is away$") as refused, before_start():
        raise error
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("error", [DataError("crc32"), CheckpointError("crc32"), ConfigError("crc32.")])
def test_bad_input_after_the_start_is_failed_work(error: VswinError) -> None:
    with pytest.raises(WorkFailed) as failed, after_start(RESUME):
        raise error
    assert str(failed.value) == f"crc32. {RESUME}" and failed.value.exit_code == 1


def test_what_is_away_after_the_start_says_once_how_to_resume() -> None:
    with pytest.raises(StorageError) as failed, after_start(RESUME), after_start(RESUME):
        raise StorageError("s3 is away", retriable=False, errno=13)
    assert str(failed.value) == f"s3 is away. {RESUME}"
    assert (failed.value.retriable, failed.value.errno) == (False, 13)
    with pytest.raises(TrackingError, match=rf"^MLflow is away\. {RESUME}$"), after_start(RESUME):
        raise TrackingError("MLflow is away")
    with pytest.raises(RanksFailed, match=rf"^x: Ray's head does not answer\. {RESUME}$"), after_start(RESUME):
        raise RanksFailed("x: Ray's head does not answer")


def test_other_errors_pass_both_lines() -> None:
    for line in (before_start(), after_start(RESUME)):
        with pytest.raises(WorkFailed, match=r"^loss is nan$"), line:
            raise WorkFailed("loss is nan")
    with pytest.raises(ConfigError, match=r"^no such key$"), before_start():
        raise ConfigError("no such key")


def test_a_storage_error_travels_between_processes() -> None:
    found = pickle.loads(pickle.dumps(StorageError("no access", retriable=False, errno=13)))
    assert (str(found), found.retriable, found.errno) == ("no access", False, 13)


def test_a_command_ends_with_the_errors_code(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        with after_start(RESUME):
            raise DataError("shard s-1.tar is damaged")

    assert run_command(fail) == 1
    assert capsys.readouterr().err == f"error: shard s-1.tar is damaged. {RESUME}\n"
