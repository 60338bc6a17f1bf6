from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URI of one real sqlite store, made once: creating its tables takes two seconds."""
    folder: Path = tmp_path_factory.mktemp("mlflow")
    return f"sqlite:///{folder}/mlflow.db"
