from __future__ import annotations

import pytest

from tests.support.mlflow_store import new_store


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URI of one real sqlite store."""
    return new_store(tmp_path_factory.mktemp("mlflow") / "mlflow.db")
