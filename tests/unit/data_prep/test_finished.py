"""What is done to a finished dataset: retry, repair, merge, the reports and the contact sheet, the dry run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep import cli, executor, journal
from data_prep.estimate import estimate
from data_prep.merge import merge
from data_prep.pipeline import list_source, shard_dataset
from data_prep.repair import repair
from data_prep.report import reject_list, stats_table, write_preview
from data_prep.retry import retry
from data_prep.settings import PrepSettings, settings_of
from data_prep.sources.folder import FolderSource
from data_prep.sources.kinetics import KineticsSource
from data_prep.verify import verify_dataset
from tests.unit.data_prep.inprocess import COPY, FAST, InProcess, prepare, tars
from tests.unit.data_prep.test_sources import IDS, kinetics_csv, tar_of, video
from tests.unit.data_prep.videos import make_folders, make_video
from vswin_dist.benchmarks import prep
from vswin_dist.errors import ConfigError, DataError, WorkFailed
from vswin_dist.manifest import Reject, read_manifest, write_manifest


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker processes here: the commands get the executor of these tests."""
    for module in ("data_prep.reprocess", "data_prep.verify", "data_prep.report"):
        monkeypatch.setattr(f"{module}.LocalExecutor", lambda workers: InProcess())
    assert executor.LocalExecutor is not InProcess


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    root = make_folders(tmp_path / "in", classes=2, each=4, frames=4)
    (root / "class 0" / "broken.mp4").write_text("no video")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("settings", [FAST, COPY], ids=["train", "copy"])
def test_repair_rebuilds_the_same_bytes_and_nothing_else(folders: Path, tmp_path: Path, settings: PrepSettings) -> None:
    out = tmp_path / "out"
    prepare(FolderSource(str(folders)), out, settings)
    before = tars(out)
    assert repair(str(out), 1, False) == ([], {})
    (out / "shard-00001.tar").unlink()
    damaged = bytearray(before["shard-00002.tar"])
    damaged[3000] ^= 1
    (out / "shard-00002.tar").write_bytes(bytes(damaged))
    stamp = (out / "shard-00000.tar").stat().st_mtime_ns
    rebuilt, wrong = repair(str(out), 1, False)
    assert rebuilt == ["shard-00001.tar", "shard-00002.tar"] and sorted(wrong) == [1, 2]
    assert tars(out) == before and (out / "shard-00000.tar").stat().st_mtime_ns == stamp
    assert verify_dataset(str(out), 1, False) == {}


@pytest.mark.slow
def test_repair_of_archives_and_of_videos_that_changed(tmp_path: Path) -> None:
    named = [(f"val/{i}_{10 * n:06d}_{10 * n + 10:06d}.mp4", video(tmp_path, n)) for n, i in enumerate(IDS[:5])]
    (tmp_path / "parts").mkdir()
    tar_of(tmp_path / "parts" / "part_0.tar.gz", named)
    source = KineticsSource(str(kinetics_csv(tmp_path / "a.csv")), str(tmp_path / "parts"))
    prepare(source, tmp_path / "out", COPY)
    before = tars(tmp_path / "out")
    (tmp_path / "out" / "shard-00001.tar").unlink()
    assert repair(str(tmp_path / "out"), 1, False)[0] == ["shard-00001.tar"]
    assert tars(tmp_path / "out") == before
    tar_of(tmp_path / "parts" / "part_0.tar.gz", [(name, video(tmp_path, 50 + n)) for n, (name, _) in enumerate(named)])
    (tmp_path / "out" / "shard-00001.tar").unlink()
    with pytest.raises(WorkFailed, match="other bytes than when it was sharded"):
        repair(str(tmp_path / "out"), 1, False)
    assert not (tmp_path / "out" / "shard-00001.tar").exists()


@pytest.mark.slow
def test_retry_adds_what_is_good_now_and_only_that(folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (folders / "class 1" / "other.mp4").write_text("no video either")
    first = prepare(FolderSource(str(folders)), out)
    before = tars(out)
    assert retry(str(out), 1, False) == first
    make_video(folders / "class 0" / "broken.mp4", frames=5, seed=900)
    second = retry(str(out), 1, False)
    assert second == read_manifest(str(out)) and second.read == first.read
    assert [s.source_id for s in second.samples[len(first.samples) :]] == ["class 0/broken.mp4"]
    assert [r.source_id for r in second.rejected] == ["class 1/other.mp4"]
    after = tars(out)
    assert {n: after[n] for n in before} == before and len(after) == len(before) + 1
    assert verify_dataset(str(out), 1, False) == {}
    (folders / "class 1" / "other.mp4").write_bytes((folders / "class 1" / "v0.mp4").read_bytes())
    assert [r.reason for r in retry(str(out), 1, False).rejected] == ["duplicate"]


@pytest.mark.slow
def test_what_retry_added_is_named_where_the_manifest_is_made_again(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    prepare(FolderSource(str(folders)), out)
    make_video(folders / "class 0" / "broken.mp4", frames=5, seed=900)
    grown, before = retry(str(out), 1, False), tars(out)
    (out / "manifest.json").unlink()
    again = shard_dataset(FolderSource(str(folders)), str(out), FAST, executor=InProcess)
    assert len(again.samples) == len(grown.samples) - 1
    told = capsys.readouterr().err
    assert f"'{grown.shards[-1].url}': not listed" in told and f"run data-prep retry {out} again" in told
    assert retry(str(out), 1, False) == grown and tars(out) == before


@pytest.mark.slow
def test_retry_keeps_duplicates_where_the_dataset_does(folders: Path, tmp_path: Path) -> None:
    settings = replace(FAST, keep_duplicates=True)
    first = prepare(FolderSource(str(folders)), tmp_path / "out", settings)
    (folders / "class 0" / "broken.mp4").write_bytes((folders / "class 0" / "v0.mp4").read_bytes())
    second = retry(str(tmp_path / "out"), 1, False)
    assert not second.rejected and len(second.samples) == len(first.samples) + 1


@pytest.mark.slow
def test_retry_and_repair_take_the_url_of_the_manifest(folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(FolderSource(str(folders)), out)
    before = tars(out)
    (out / "shard-00001.tar").unlink()
    assert repair(str(out / "manifest.json"), 1, False)[0] == ["shard-00001.tar"] and tars(out) == before
    make_video(folders / "class 0" / "broken.mp4", frames=5, seed=900)
    assert cli.main(["retry", str(out / "manifest.json"), "--workers", "1"]) == 0
    assert len(tars(out)) == len(before) + 1 and verify_dataset(str(out), 1, False) == {}


@pytest.mark.slow
def test_verify_compares_the_fingerprint_with_the_content(folders: Path, tmp_path: Path) -> None:
    manifest = prepare(FolderSource(str(folders)), tmp_path / "out", COPY)
    vars(manifest)["fingerprint"] = "0" * 32  # a writer that is not ours, whose files fit each other
    write_manifest(manifest, str(tmp_path / "out"))
    expected = replace(manifest).fingerprint
    [problem] = verify_dataset(str(tmp_path / "out"), 1, False)[-1]
    assert problem == f"the manifest says fingerprint {'0' * 32}, its content has {expected}"


@pytest.mark.slow
def test_a_dataset_without_its_journal_says_so(folders: Path, tmp_path: Path) -> None:
    prepare(FolderSource(str(folders)), tmp_path / "out", COPY)
    (tmp_path / "out" / ".data-prep" / "plan.json").unlink()
    with pytest.raises(DataError, match="no journal"):
        retry(str(tmp_path / "out"), 1, False)


@pytest.mark.slow
def test_merge_joins_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 500)):
        root = make_folders(tmp_path / name, classes=2, each=2, frames=3)
        for number, path in enumerate(sorted(root.rglob("v*.mp4"))):
            make_video(path.with_name(f"{name}-{path.name}"), frames=3, seed=seed + number)
            path.unlink()
        prepare(FolderSource(str(root)), tmp_path / "sets" / name, COPY)
    urls = [str(tmp_path / "sets" / n) for n in "ab"]
    joined = merge(str(tmp_path / "sets"), urls, "both", "train")
    assert (joined.read, len(joined.samples)) == (8, sum(len(read_manifest(u).samples) for u in urls))
    assert [s.url for s in joined.shards] == [
        "a/shard-00000.tar",
        "a/shard-00001.tar",
        "b/shard-00000.tar",
        "b/shard-00001.tar",
    ][: len(joined.shards)]
    assert verify_dataset(str(tmp_path / "sets"), 1, False) == {}
    elsewhere = merge(str(tmp_path / "far"), urls, "both", "train")
    assert elsewhere.fingerprint == joined.fingerprint and elsewhere.shards[0].url.startswith("/")
    assert merge(str(tmp_path / "far"), urls, "both", "train") == elsewhere
    with pytest.raises(DataError, match="stand twice"):
        merge(str(tmp_path / "x"), [urls[0], urls[0]], "twice", "train")
    with pytest.raises(ConfigError):
        merge(str(tmp_path / "x"), urls[:1], "one", "train")
    assert joined.sampling == "dense"
    other = write_manifest(replace(read_manifest(urls[1]), sampling="uniform"), str(tmp_path / "uniform"))
    with pytest.raises(DataError, match=r"is to be sampled uniform, .* dense: shard one of them again with --sampling"):
        merge(str(tmp_path / "x"), [urls[0], other], "n", "train")
    other = write_manifest(replace(read_manifest(urls[1]), colours=1), str(tmp_path / "earlier"))
    with pytest.raises(DataError, match=r"keep colours differently \(1 and 2\): shard the older one again"):
        merge(str(tmp_path / "x"), [urls[0], other], "n", "train")
    prepare(FolderSource(str(tmp_path / "b")), tmp_path / "small", FAST)
    with pytest.raises(DataError, match="profile"):
        merge(str(tmp_path / "x"), [urls[0], str(tmp_path / "small")], "n", "train")
    three = make_folders(tmp_path / "c", classes=3, each=1, frames=3)
    prepare(FolderSource(str(three)), tmp_path / "three", COPY)
    with pytest.raises(DataError, match="classes"):
        merge(str(tmp_path / "x"), [urls[0], str(tmp_path / "three")], "n", "train")
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_reports_hold_the_figures_and_pictures_and_escape_names(folders: Path, tmp_path: Path) -> None:
    (folders / "class 0").rename(folders / "<b>loud & clear")
    make_video(folders / "nobody's.mp4", frames=3)
    manifest = prepare(FolderSource(str(folders)), tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["counts"] == manifest.counts and report["fingerprint"] == manifest.fingerprint
    assert report["videos_without_row"] == ["nobody's.mp4"]
    assert [c["kept"] for c in report["classes"]] == [4, 4]
    html = (tmp_path / "out" / "report.html").read_text()
    assert html.count("data:image/jpeg;base64,") == 6 and "&lt;b&gt;loud &amp; clear" in html and "<b>loud" not in html
    assert "http" not in html.replace("http-equiv", ""), "the page must need nothing else"
    assert "unreadable" in html and "broken.mp4" in html and "Videos kept of a class: 4 to 4" in html
    missing = Reject("gone", "c", "missing_video", "")
    assert reject_list(replace(manifest, rejected=[missing, *manifest.rejected]), most=1)[0].endswith(
        manifest.rejected[0].detail
    )
    assert write_preview(str(tmp_path / "out"), str(tmp_path / "sheet.html"), 3, 1) == 3
    assert (tmp_path / "sheet.html").read_text().count("<img") == 3 * 4  # four frames each
    table = stats_table(manifest)
    assert "read 9 = kept 8 + rejected 1" in table and "1  unreadable" in table


@pytest.mark.slow
def test_the_dry_run_writes_nothing_and_its_estimate_is_of_the_right_size(folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = estimate(list_source(FolderSource(str(folders)), str(out), COPY, None, None))
    assert not out.exists()
    assert (found.videos, found.classes, found.probed) == (9, 2, 9)
    assert found.verdicts == {"kept": 8, "unreadable": 1}
    made = prepare(FolderSource(str(folders)), out, COPY)
    assert found.bytes == pytest.approx(sum(s.bytes for s in made.shards), rel=0.5)
    assert "about" in found.lines(2)[-1]


@pytest.mark.slow
def test_settings_come_back_from_the_journal(folders: Path, tmp_path: Path) -> None:
    settings = replace(FAST, seed=3, window=5, encoding=replace(FAST.encoding, max_fps=12.5, crf=30))
    prepare(FolderSource(str(folders)), tmp_path / "out", settings)
    recorded = (journal.read_specification(str(tmp_path / "out")) or {})["settings"]
    assert settings_of(recorded) == settings


@pytest.mark.slow
def test_the_benchmark_compares_the_same_videos(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vswin_dist.benchmarks.prep.LocalExecutor", lambda workers: InProcess())
    monkeypatch.setattr("vswin_dist.benchmarks.prep.ffmpeg", lambda: None)
    assert prep.main(["folder", "--videos", str(folders), "--count", "6"]) == 0
    told = capsys.readouterr().out
    assert "packing, 6 videos" in told or "packing, 5 videos" in told
    assert "clips from shards" in told and "not compared" in told
