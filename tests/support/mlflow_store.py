"""A new MLflow database in an instant: a copy of one that MLflow has made, which takes five seconds of computing."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path


def new_store(file: Path) -> str:
    """Put an empty store where `file` says, in a folder that is made; its URI."""
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(_template(), file)
    return f"sqlite:///{file}"


@functools.cache
def _template() -> Path:
    """The database that this process copies; it goes with the session's temporary folder."""
    from mlflow import MlflowClient

    file = Path(tempfile.mkdtemp(prefix="mlflow-", dir=tempfile.gettempdir())) / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file
