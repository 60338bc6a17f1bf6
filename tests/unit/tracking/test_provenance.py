from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from vswin_dist.tracking import provenance


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://KEY:SECRET@bucket/a", "s3://bucket/a"),
        ("postgresql+psycopg2://me:pw@db:5432/mlflow", "postgresql+psycopg2://db:5432/mlflow"),
        ("https://host/a/b.tar?X-Amz-Signature=abc&x=1 and more", "https://host/a/b.tar and more"),
        ("storage.secret_access_key: abc/def", "storage.secret_access_key: ***"),
        ('{"api_key": "abc", "size": 1}', '{"api_key": ***, "size": 1}'),
        ("my.password: with some words", "my.password: ***"),
        ("export AWS_SESSION_TOKEN=abc", "export AWS_SESSION_TOKEN=***"),
        ("key AKIAABCDEFGHIJKLMNOP here", "key *** here"),
        ("data.train: s3://bucket/k400/train\nmodel.tokens: 5", "data.train: s3://bucket/k400/train\nmodel.tokens: 5"),
        ("token:\n  size: 3", "token:\n  size: 3"),
        ("models:/k400@champion", "models:/k400@champion"),
    ],
)
def test_redact_takes_out_what_gives_access_and_nothing_else(text: str, expected: str) -> None:
    assert provenance.redact(text) == expected


def test_flatten_names_nested_fields_and_hides_secrets() -> None:
    @dataclass
    class Part:
        sizes: tuple[int, ...] = (2, 4)
        none: None = None

    @dataclass
    class Whole:
        part: Part = field(default_factory=Part)
        s3_secret: str = "hush"
        url: str = "https://me:pw@host/x?sig=1"

    assert provenance.flatten(Whole()) == {
        "part.sizes": "[2, 4]",
        "part.none": "null",
        "s3_secret": "***",
        "url": "https://host/x",
    }
    nested = {"a": {"b": {"password": "x", "flag": True}}}
    assert provenance.flatten(nested) == {"a.b.password": "***", "a.b.flag": "true"}


@pytest.fixture
def no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(provenance.SOURCE_COMMIT, raising=False)


def git(folder: Path, *command: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *command], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_source_version_is_the_commit_passed_at_submission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(provenance.SOURCE_COMMIT, "abc123")
    assert provenance.source_version(tmp_path) == "abc123"


@pytest.mark.usefixtures("no_commit")
def test_source_version_is_gits_and_says_when_files_differ(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-qm", "one")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert provenance.source_version(tmp_path) == head
    (tmp_path / "a.py").write_text("x = 2\n")
    assert provenance.source_version(tmp_path) == f"{head}-dirty"
    # What was shipped into an untracked folder of someone's checkout is not that checkout.
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    (shipped / "b.py").write_text("y = 1\n")
    assert provenance.source_version(shipped).startswith("tree-")


@pytest.mark.usefixtures("no_commit")
def test_tree_hash_depends_on_sources_alone(tmp_path: Path) -> None:
    def tree(name: str) -> Path:
        folder = tmp_path / name / "pkg"
        folder.mkdir(parents=True)
        (folder / "a.py").write_text("x = 1\n")
        (folder / "r.yaml").write_text("lr: 1\n")
        return folder.parent

    one, two = tree("one"), tree("two")
    version = provenance.source_version(one)
    assert version.startswith("tree-") and len(version) == 5 + 64
    (two / "notes.txt").write_text("x")
    (two / "pkg" / "__pycache__").mkdir()
    (two / "pkg" / "__pycache__" / "a.py").write_text("x")
    assert provenance.source_version(two) == version
    (two / "pkg" / "r.yaml").write_text("lr: 2\n")
    assert provenance.source_version(two) != version
    os.rename(one / "pkg" / "a.py", one / "pkg" / "b.py")
    assert provenance.source_version(one) != version


def test_package_versions_have_what_decides_results_and_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "hush-hush-hush")
    found = provenance.package_versions()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "mlflow", "deepspeed", "ray", "webdataset"} <= set(found)
    assert "hush-hush-hush" not in str(found)


def test_importing_tracking_imports_nothing_heavy() -> None:
    code = (
        "import sys, vswin_dist.tracking; "
        "print([m for m in ('mlflow', 'torch', 'ray', 'pandas', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
