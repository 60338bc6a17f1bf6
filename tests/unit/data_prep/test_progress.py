"""Progress where stderr is a log and where it is a terminal."""

from __future__ import annotations

import io
import re
import sys

import pytest

from data_prep import progress
from data_prep.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def count(total: int, done: int = 0, shown: bool = True) -> None:
    bar = Progress(total, "videos", done, shown)
    for n in range(done, total):
        bar.advance(f"{n} rejected")
    bar.close(", 3 rejected")


LAST = re.compile(r"1,000 videos in \d\d:\d\d, \d+\.\d/s, 3 rejected")


def test_a_log_gets_one_line_where_the_work_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    count(1000)
    assert LAST.fullmatch(capsys.readouterr().err.removesuffix("\n"))


def test_a_log_gets_plain_lines_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PLAIN_S", 1e-9)
    count(1000, done=990)
    *lines, last = capsys.readouterr().err.removesuffix("\n").split("\n")
    assert len(lines) == 10 and LAST.fullmatch(last)
    for n, line in enumerate(lines, 990):
        assert re.fullmatch(rf"{n + 1}/1000 videos \d+\.\d%, .* videos/s, \d\d:\d\d left, {n} rejected", line), line


def test_a_terminal_gets_a_bar_that_is_replaced_by_the_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "TERMINAL_S", 0.0)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    count(1000, done=995)
    drawn = terminal.getvalue().split("\r")
    assert LAST.fullmatch(drawn[-1].removesuffix("\n")) and terminal.getvalue().count("\n") == 1
    assert drawn[-2].isspace(), "the bar is erased before the last line"
    assert any("998/1000" in line and "997 rejected" in line for line in drawn)


def test_silence_where_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    count(1000, shown=False)
    assert capsys.readouterr().err == ""
