"""A source to shards in one process: order, cutting, manifest, resume, refusals. The worker processes are real in
tests/integration; here tasks run in this process, so that many cases stay fast."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import zlib
from pathlib import Path
from typing import Any

import pytest

from data_prep.executor import Done
from data_prep.journal import only_writer
from data_prep.pack import sample_key
from data_prep.pipeline import Attempt, list_source
from data_prep.settings import PrepSettings, parse_size
from data_prep.sources.csv_index import CsvSource, parse_where
from data_prep.sources.folder import FolderSource
from data_prep.sources.kinetics import KineticsSource
from data_prep.verify import check_shard, verify_dataset
from tests.support.shards import with_a_hollow_video
from tests.unit.data_prep.inprocess import COPY, FAST, InProcess, prepare, tars
from tests.unit.data_prep.test_sources import kinetics_csv
from tests.unit.data_prep.videos import make_folders, make_video
from vswin_dist.errors import ConfigError, DataError, WorkFailed
from vswin_dist.manifest import read_manifest


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of four videos, a text file among them and a video beside the class folders."""
    root = make_folders(tmp_path_factory.mktemp("videos"), classes=2, each=4, frames=6)
    (root / "class 0" / "broken.mp4").write_text("no video")
    make_video(root / "classless.mp4", frames=4)
    return root


@pytest.mark.slow
def test_manifest_members_and_rejects(folders: Path, tmp_path: Path) -> None:
    manifest = prepare(FolderSource(str(folders)), tmp_path)
    assert manifest.counts == {"read": 9, "kept": 8, "rejected": 1, "reasons": {"unreadable": 1}}
    assert manifest.rejected[0].source_id == "class 0/broken.mp4"
    assert manifest.classes == ["class 0", "class 1"]
    assert [s.samples for s in manifest.shards] == [3, 3, 2]
    for sample in manifest.samples:
        with tarfile.open(tmp_path / manifest.shards[sample.shard].url) as tar:
            names = [f"{sample.key}.{e}" for e in ("cls", "json", "mp4")]
            cls, facts, video = ((tar.extractfile(n) or pytest.fail(n)).read() for n in names)
            assert tar.getmember(names[0]).mtime == 0
        assert int(cls) == sample.class_id and json.loads(facts)["source_id"] == sample.source_id
        raw = (tmp_path / manifest.shards[sample.shard].url).read_bytes()[sample.offset : sample.offset + sample.size]
        assert raw == video and zlib.crc32(raw) == sample.crc32
    assert read_manifest(str(tmp_path)).fingerprint == manifest.fingerprint
    assert not (tmp_path / ".data-prep" / "staging").exists()


@pytest.mark.slow
@pytest.mark.parametrize("settings", [FAST, COPY], ids=["train", "copy"])
def test_same_bytes_whatever_the_order_of_completion_and_the_stops(
    folders: Path, tmp_path: Path, settings: PrepSettings
) -> None:
    first = prepare(FolderSource(str(folders)), tmp_path / "a", settings)
    prepare(FolderSource(str(folders)), tmp_path / "b", settings, executor=InProcess(backwards=True))
    ran = []
    for attempt in range(100):
        pool = InProcess(backwards=attempt % 2 == 1, stop_after=1)
        try:
            prepare(FolderSource(str(folders)), tmp_path / "c", settings, executor=pool)
            break
        except WorkFailed:
            ran += pool.ran
            assert not (tmp_path / "c" / "manifest.json").exists()
    else:
        pytest.fail("it never finishes")
    ran += pool.ran
    assert len(ran) == len(set(ran)) == 9 + 3, "finished work was repeated"
    assert tars(tmp_path / "a") == tars(tmp_path / "b") == tars(tmp_path / "c")
    texts = {(tmp_path / x / "manifest.json").read_bytes() for x in "abc"}
    assert len(texts) == 1 and first.fingerprint.encode() in texts.pop()


@pytest.mark.slow
def test_the_seed_changes_the_order_and_classes_are_mixed(folders: Path, tmp_path: Path) -> None:
    one = prepare(FolderSource(str(folders)), tmp_path / "a", COPY)
    two = prepare(FolderSource(str(folders)), tmp_path / "b", PrepSettings(COPY.encoding, shard_count=3, seed=1))
    assert [s.key for s in one.samples] != [s.key for s in two.samples]
    assert sorted(s.key for s in one.samples) == sorted(s.key for s in two.samples)
    assert [s.class_id for s in one.samples] not in ([0] * 4 + [1] * 4, [1] * 4 + [0] * 4)


@pytest.mark.slow
def test_shards_are_cut_at_the_target_size(folders: Path, tmp_path: Path) -> None:
    manifest = prepare(FolderSource(str(folders)), tmp_path, PrepSettings(COPY.encoding, shard_bytes=14_000))
    assert len(manifest.shards) > 2
    assert all(s.bytes - 10_240 <= 14_000 for s in manifest.shards)  # tar pads its end to 10 kB


@pytest.mark.slow
def test_duplicates_are_rejected_unless_asked_for(tmp_path: Path) -> None:
    root = make_folders(tmp_path / "in", classes=1, each=2, frames=4)
    (root / "class 0" / "twin.mp4").write_bytes((root / "class 0" / "v0.mp4").read_bytes())
    manifest = prepare(FolderSource(str(root)), tmp_path / "a")
    assert manifest.counts["reasons"] == {"duplicate": 1}
    assert {manifest.rejected[0].source_id, "class 0/v1.mp4"} < {f"class 0/{n}.mp4" for n in ("v0", "v1", "twin")}
    kept = prepare(FolderSource(str(root)), tmp_path / "b", PrepSettings(FAST.encoding, keep_duplicates=True))
    assert len(kept.samples) == 3


def test_csv_rows_where_and_missing_videos(folders: Path, tmp_path: Path) -> None:
    index = tmp_path / "index.csv"
    index.write_text(
        "path,label,subject\nclass 0/v0.mp4,left,1\nclass 0/v1.mp4,right,2\nclass 1/v0.mp4,left,3\n"
        "class 1/gone.mp4,right,3\n-dash.mp4,left,9\n"
    )
    source = CsvSource(str(index), str(folders), "path", "label", parse_where(["subject=1,3"]))
    manifest = prepare(source, tmp_path / "out")
    assert manifest.counts == {"read": 3, "kept": 2, "rejected": 1, "reasons": {"missing_video": 1}}
    assert manifest.classes == ["left", "right"]
    listing = source.listing()
    assert "class 1/v3.mp4" in listing.unlabelled and "class 0/v1.mp4" not in listing.unlabelled


def test_bad_input_is_refused_before_anything_is_written(folders: Path, tmp_path: Path) -> None:
    index, out = tmp_path / "index.csv", tmp_path / "out"
    index.write_text("path,label\nclass 0/v0.mp4,left\n")

    def csv(**changes: Any) -> CsvSource:
        return CsvSource(
            **{
                "index": str(index),
                "videos": str(folders),
                "path_column": "path",
                "label_column": "label",
                "where": {},
                **changes,
            }
        )

    cases: list[tuple[str, Any, dict[str, Any]]] = [
        ("does not exist", FolderSource(str(tmp_path / "none")), {}),
        ("has no class folders", FolderSource(str(folders / "class 0")), {}),
        ("did you mean 'label'", csv(label_column="lable"), {}),
        ("does not exist", csv(index=str(tmp_path / "none.csv")), {}),
        ("not a text file", csv(index=str(folders / "class 0" / "v0.mp4")), {}),
        ("not among the 1 names", csv(), {"classes": ["right"]}),
        ("no column 'x'", csv(where={"x": ["1"]}), {}),
    ]
    for text, source, more in cases:
        with pytest.raises(DataError) as caught:
            prepare(source, out, **more)
        assert text in str(caught.value).lower() or text in str(caught.value), str(caught.value)
        assert "\n" not in str(caught.value)
    for row, text in (
        ("../up.mp4,left", "leaves the video folder"),
        ("/etc/passwd,left", "leaves"),
        ("gone.mp4,left", "none of the"),
        ("class 0/v0.mp4,", "without a class"),
    ):
        index.write_text(f"path,label\n{row}\n")
        with pytest.raises(DataError, match=text):
            prepare(csv(), out)
    for url in ("s3://key:secret@bucket/x", "https://host/a.tar?X-Amz-Signature=abc", "az://c/a?sv=1&sig=abc"):
        with pytest.raises(ConfigError, match="credentials") as refused:
            prepare(FolderSource(url), out)
        assert "abc" not in str(refused.value) and "secret" not in str(refused.value)
    (tmp_path / "urls.txt").write_text("https://host/part_0.tar.gz?token=abc\n")
    with pytest.raises(ConfigError, match="credentials"):
        prepare(KineticsSource(str(kinetics_csv(tmp_path / "k.csv")), str(tmp_path / "urls.txt")), out)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / os.fsdecode(b"a\xff.mp4")).write_text("x")
    with pytest.raises(DataError, match="is not UTF-8"):
        prepare(FolderSource(str(tmp_path)), out)
    assert not out.exists()


@pytest.mark.slow
def test_shards_with_the_colours_of_before_are_not_added_to(folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(FolderSource(str(folders)), out, FAST)
    plan, manifest = out / ".data-prep" / "plan.json", out / "manifest.json"
    for path in (plan, manifest):
        assert path.read_text().count('"colours":') == (1 if path == plan else 2)
    body = json.loads(plan.read_text())
    del body["settings"]["encoding"]["colours"]
    plan.write_text(json.dumps(body))
    with pytest.raises(DataError, match=r"encoding\.colours was None, is now 2"):
        prepare(FolderSource(str(folders)), out, FAST)


@pytest.mark.slow
def test_an_output_that_holds_something_else_is_refused_and_left_alone(folders: Path, tmp_path: Path) -> None:
    prepare(FolderSource(str(folders)), tmp_path, COPY)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(DataError, match=r"encoding\.profile was 'copy', is now 'train'"):
        prepare(FolderSource(str(folders)), tmp_path, FAST)
    with pytest.raises(DataError, match="lists other videos"):
        prepare(FolderSource(str(make_folders(tmp_path.parent / "others", 2, 1, 4))), tmp_path, COPY)
    assert prepare(FolderSource(str(folders)), tmp_path, COPY, executor=InProcess(stop_after=0)).read == 9
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    foreign = tmp_path.parent / "foreign"
    foreign.mkdir()
    (foreign / "shard-00000.tar").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"already holds 'shard-00000\.tar'"):
        prepare(FolderSource(str(folders)), foreign, COPY)
    assert [p.name for p in foreign.iterdir()] == ["shard-00000.tar"]


def test_not_one_video_kept_is_a_failure_without_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "in" / "c").mkdir(parents=True)
    (tmp_path / "in" / "c" / "a.mp4").write_text("x")
    with pytest.raises(
        WorkFailed, match=r"not one of 1 videos could be kept: 1 unreadable\. .* remove .*/out/\.data-prep, "
    ):
        prepare(FolderSource(str(tmp_path / "in")), tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    make_video(tmp_path / "in" / "c" / "a.mp4", frames=3)
    shutil.rmtree(tmp_path / "out" / ".data-prep")
    assert len(prepare(FolderSource(str(tmp_path / "in")), tmp_path / "out").samples) == 1


@pytest.mark.slow
def test_verify_names_every_kind_of_damage(folders: Path, tmp_path: Path) -> None:
    manifest = prepare(FolderSource(str(folders)), tmp_path, COPY)
    whole = (tmp_path / "shard-00000.tar").read_bytes()
    first = next(s for s in manifest.samples if s.shard == 0)

    def problems(data: bytes) -> str:
        (tmp_path / "shard-00000.tar").write_bytes(data)
        from data_prep.verify import ShardTask

        task = ShardTask(
            0, str(tmp_path / "shard-00000.tar"), manifest.shards[0], [s for s in manifest.samples if s.shard == 0]
        )
        return " | ".join(check_shard(task))

    assert problems(whole) == ""
    assert "breaks off" in problems(whole[: first.offset + 100]) and "the manifest says" in problems(whole[:-512])
    assert "ends after 3 of 9 members" in problems(whole[: first.offset + -(-first.size // 512) * 512])
    flipped = bytearray(whole)
    flipped[first.offset + 10] ^= 1
    assert "crc32" in problems(bytes(flipped)) and "sha256" in problems(bytes(flipped))
    renamed = whole.replace(first.key.encode(), first.key[:-1].encode() + b"!", 1)
    assert "expected" in problems(renamed) or "breaks off" in problems(renamed)
    assert "sha256" in problems(b"")
    (tmp_path / "shard-00000.tar").unlink()
    (tmp_path / "shard-00009.tar").write_bytes(whole)
    assert verify_dataset(str(tmp_path), 1, show_progress=False) == {
        -1: ["shard-00009.tar: a shard that the manifest does not list"],
        0: ["shard-00000.tar: missing"],
    }


def test_verify_refuses_a_set_with_a_video_of_no_frames(folders: Path, tmp_path: Path) -> None:
    prepare(FolderSource(str(folders)), tmp_path / "out", FAST)
    first = with_a_hollow_video(tmp_path / "out", tmp_path / "hollow", 1)
    with pytest.raises(DataError, match=rf"1 without content: '{first.source_id}' with 0 frames, {first.size} bytes"):
        verify_dataset(str(tmp_path / "hollow"), 1, False)


def test_keys_have_no_dots_and_differ() -> None:
    ids = ["a/b.mp4", "a/b.avi", "a.b.mp4", "a_b.mp4", "a/b/.mp4", "-x.mp4", "ä ö.mp4", "x" * 200 + ".mp4"]
    keys = [sample_key(i) for i in ids]
    assert len(set(keys)) == len(keys)
    assert all("." not in k and "/" not in k and not k.startswith("-") and len(k) < 90 and k.isascii() for k in keys)


def test_sizes() -> None:
    assert [parse_size(t) for t in ("256MB", "64 MiB", "1.5G", "1000", "2kb")] == [
        256 * 10**6,
        64 << 20,
        15 * 10**8,
        1000,
        2000,
    ]
    for bad in ("", "MB", "-1", "1TB5", "0"):
        with pytest.raises(ConfigError):
            parse_size(bad)


@pytest.mark.slow
def test_what_a_killed_run_left_half_written_is_removed(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkFailed):
        prepare(FolderSource(str(folders)), tmp_path, executor=InProcess(stop_after=3))
    left = [tmp_path / ".shard-00000.tar.x.tmp", tmp_path / ".data-prep" / "records" / ".00000000.json.x.tmp"]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    prepare(FolderSource(str(folders)), tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.slow
def test_what_a_killed_worker_packed_and_did_not_remove_does_not_wait(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("data_prep.journal.Staging.discard", lambda *_: None)
        with pytest.raises(WorkFailed):
            prepare(FolderSource(str(folders)), tmp_path, executor=InProcess(stop_after=8))
    attempt = Attempt(list_source(FolderSource(str(folders)), str(tmp_path), FAST, None, None), InProcess(), False)
    packed = {index for finished in attempt.ranges.values() for index in range(finished.start, finished.end)}
    assert packed and attempt.outcomes and not packed & set(attempt.outcomes)
    assert attempt.waiting_bytes == sum(o.size for o in attempt.outcomes.values())
    assert prepare(FolderSource(str(folders)), tmp_path) == prepare(FolderSource(str(folders)), tmp_path / "b")


@pytest.mark.slow
def test_what_waits_for_its_shard_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first video comes last; meanwhile only so many others are staged."""
    root = make_folders(tmp_path / "in", classes=1, each=40, frames=3)
    staging = tmp_path / "out" / ".data-prep" / "staging"
    staged: list[int] = []

    class FirstLast(InProcess):
        def wait(self) -> Done:
            if self.tasks[0].ticket == ("video", 0) and len(self.tasks) > 1:
                self.tasks.rotate(-1)
            done = super().wait()
            staged.append(sum(p.stat().st_size for p in staging.glob("0*")))
            return done

    monkeypatch.setattr("data_prep.pipeline.SPARE_BYTES", 0)
    settings = PrepSettings(FAST.encoding, shard_bytes=10_000)
    manifest = prepare(FolderSource(str(root)), tmp_path / "out", settings, executor=FirstLast())
    largest = max(s.size for s in manifest.samples) + 400  # the outcome's own line
    assert sum(s.size for s in manifest.samples) > 3 * 10_000, "the set is too small to tell"
    assert max(staged) < 2 * 10_000 + 5 * largest


@pytest.mark.slow
def test_file_names_are_only_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["-dash.mp4", "a;touch here $(touch here).mp4", "a::b.mp4", "[x]*?.mp4", "ä.mp4", "new\nline.mp4", "~.mp4"]
    for seed, name in enumerate(names):
        make_video(tmp_path / "video.mp4", frames=3, seed=seed).rename(tmp_path / "made.mp4")
        (tmp_path / "in" / "-c").mkdir(parents=True, exist_ok=True)
        (tmp_path / "made.mp4").rename(tmp_path / "in" / "-c" / name)
    for settings in (COPY, FAST):
        manifest = prepare(FolderSource("in"), tmp_path / settings.encoding.profile, settings)
        assert sorted(s.source_id for s in manifest.samples) == sorted(f"-c/{n}" for n in names)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "in", "train"]


@pytest.mark.slow
def test_a_worker_that_died_before_it_could_answer_has_done_its_shard(folders: Path, tmp_path: Path) -> None:
    """The task comes again when its staged bytes are gone."""

    class Twice(InProcess):
        def wait(self) -> Done:
            task = self.tasks[0]
            if isinstance(task.ticket, tuple) and task.ticket[0] == "shard":
                task.function(task.argument)
            return super().wait()

    prepare(FolderSource(str(folders)), tmp_path / "a", executor=Twice())
    prepare(FolderSource(str(folders)), tmp_path / "b")
    assert tars(tmp_path / "a") == tars(tmp_path / "b")


@pytest.mark.slow
@pytest.mark.parametrize(("deleted", "problem"), [(False, "changed"), (True, "cannot be read any more")])
def test_a_file_that_changed_after_its_verdict_is_verified_anew(tmp_path: Path, deleted: bool, problem: str) -> None:
    videos = make_folders(tmp_path / "in", classes=1, each=3, frames=3)
    (tmp_path / "i.csv").write_text("path,label\n" + "".join(f"class 0/v{n}.mp4,c\n" for n in range(3)))
    source = CsvSource(str(tmp_path / "i.csv"), str(videos), "path", "label", {})
    file = videos / "class 0" / "v1.mp4"

    class Changing(InProcess):
        def wait(self) -> Done:
            if self.tasks[0].ticket == ("shard", 0):
                file.unlink()
                if not deleted:
                    make_video(file, frames=5, seed=700)
            return super().wait()

    with pytest.raises(WorkFailed, match=rf"v1\.mp4: {file} {problem}.* Run the same command again"):
        prepare(source, tmp_path / "out", COPY, executor=Changing())
    manifest = prepare(source, tmp_path / "out", COPY)
    assert len(manifest.samples) == (2 if deleted else 3)
    assert [r.reason for r in manifest.rejected] == ["missing_video"] * deleted
    assert verify_dataset(str(tmp_path / "out"), 1, False) == {}


@pytest.mark.slow
@pytest.mark.parametrize("comes", [True, False], ids=["more shards", "fewer shards"])
def test_a_gap_that_is_cut_otherwise_than_before_spoils_no_shard(tmp_path: Path, comes: bool) -> None:
    """Shard 0 is left out as the run stops; then one of its videos comes or goes."""
    videos = make_folders(tmp_path / "in", classes=1, each=6, frames=3)
    (tmp_path / "i.csv").write_text("path,label\n" + "".join(f"class 0/v{n}.mp4,c\n" for n in range(6)))
    source = CsvSource(str(tmp_path / "i.csv"), str(videos), "path", "label", {})
    settings = PrepSettings(FAST.encoding, shard_count=2 if comes else 1)
    out, away = tmp_path / "out", tmp_path / "away.mp4"
    first = videos / list_source(source, str(out), settings, None, None).items[0].source_id

    class Gap(InProcess):
        def wait(self) -> Done:
            if self.tasks[0].ticket == ("shard", 0):
                self.tasks.rotate(-1)
            if self.tasks[0].ticket == ("shard", 0):
                raise WorkFailed("stopped by the test")
            return super().wait()

    if comes:
        first.rename(away)
    with pytest.raises(WorkFailed, match="stopped by the test"):
        prepare(source, out, settings, executor=Gap())
    assert "shard-00001.tar" in tars(out) and "shard-00000.tar" not in tars(out)
    shutil.rmtree(out / ".data-prep" / "staging")  # as on another machine
    (away.rename(first) if comes else first.rename(away))
    with pytest.raises(WorkFailed, match=r"were removed, to be made again .* Run the same command again to resume"):
        prepare(source, out, settings)
    assert prepare(source, out, settings) == prepare(source, tmp_path / "anew", settings)
    assert tars(out) == tars(tmp_path / "anew") and verify_dataset(str(out), 1, False) == {}


def test_a_second_run_into_the_same_folder_is_refused(folders: Path, tmp_path: Path) -> None:
    with only_writer(str(tmp_path)), pytest.raises(DataError, match="another data-prep works on"):
        prepare(FolderSource(str(folders)), tmp_path)
