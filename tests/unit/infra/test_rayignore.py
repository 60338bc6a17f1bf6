"""What `ray job submit --working-dir .` ships: packed by Ray's own code, it is small and holds what a job needs."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path

from ray._private.runtime_env.packaging import create_package

from tests.support.commands import ROOT

MOST = 5 << 20  # bytes
NEEDED = {"jobs/train.py", "jobs/prepare.py", "vswin_dist/config/recipes/demo.yaml", "data_prep/templates/report.html"}
NOT_NEEDED = [".venv/lib/python3.11/torch.so", ".git/objects/pack", "tests/data.bin", "build/lib/x.bin", "__pycache__/x.pyc"]


def shipped(folder: Path, target: Path) -> dict[str, int]:
    """The files of the package that Ray makes of a folder, with their sizes in it."""
    create_package(str(folder), target, include_gitignore=True)
    with zipfile.ZipFile(target) as package:
        return {entry.filename: entry.compress_size for entry in package.infolist() if not entry.is_dir()}


def test_what_is_shipped_is_small_and_whole(tmp_path: Path) -> None:
    files = shipped(ROOT, tmp_path / "package.zip")
    assert not NEEDED - files.keys()
    assert (tmp_path / "package.zip").stat().st_size < MOST, sorted(files.items(), key=lambda f: -f[1])[:5]
    assert not [name for name in files if name.split("/")[0] in (".git", ".venv", "tests")]


def test_what_lies_about_is_not_shipped(tmp_path: Path) -> None:
    folder = tmp_path / "checkout"
    (folder / "jobs").mkdir(parents=True)
    (folder / "jobs/train.py").write_text("")
    for name in (".rayignore", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    for name in NOT_NEEDED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(os.urandom(1000))
    assert set(shipped(folder, tmp_path / "package.zip")) - {".gitignore", ".rayignore"} == {"jobs/train.py"}
