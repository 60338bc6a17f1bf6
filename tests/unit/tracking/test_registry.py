from __future__ import annotations

import json
from pathlib import Path

import pytest

from vswin_dist import storage
from vswin_dist.errors import CheckpointError, ConfigError
from vswin_dist.tracking import backend, registry, run


@pytest.fixture
def in_object_storage(tmp_path: Path) -> str:
    """A model's files at a URL (never copied, so what they hold does not matter)."""
    url = f"memory://models/{tmp_path.name}"
    storage.put_bytes(f"{url}/{registry.WEIGHTS}", b"weights")
    storage.put_bytes(f"{url}/{registry.CARD}", json.dumps({"settings": {}}).encode())
    return url


def test_a_model_at_a_url_is_registered_without_a_copy(store: str, in_object_storage: str) -> None:
    run_id = run.open_run(store, "exp", "train")
    tags = {"dataset_fingerprint": "f" * 32, "top1": 0.5, "inflated_from": None}
    assert registry.register_model(store, "large", in_object_storage, alias="champion", tags=tags, run_id=run_id) == 1
    assert registry.register_model(store, "large", in_object_storage, alias="champion", tags={}) == 2
    folder, version = registry.resolve_model(store, "models:/large/1")
    assert folder == in_object_storage
    assert version == registry.ModelVersion(
        "large", 1, run_id, {"dataset_fingerprint": "f" * 32, "top1": "0.5", "training_run": run_id}, ())
    assert version.uri == "models:/large/1"
    champion = registry.find_version(store, "models:/large@champion")
    assert (champion.version, champion.aliases, champion.run_id) == (2, ("champion",), None)


def test_what_does_not_exist_is_answered_with_what_does(store: str, in_object_storage: str) -> None:
    for alias in ("champion", "candidate"):
        registry.register_model(store, "k400-swin-b", in_object_storage, alias=alias, tags={})
    with pytest.raises(CheckpointError, match=r"k400-swin-b.*Did you mean 'k400-swin-b'"):
        registry.resolve_model(store, "models:/k400-swin-l@champion")
    with pytest.raises(CheckpointError, match=r"candidate \(version 2\), champion \(version 1\) and the versions 1 to 2"
                                              r"\. Did you mean 'champion'"):
        registry.resolve_model(store, "models:/k400-swin-b@champoin")
    with pytest.raises(CheckpointError, match=r"models:/k400-swin-b/9 does not exist.*versions 1 to 2"):
        registry.resolve_model(store, "models:/k400-swin-b/9")


@pytest.mark.parametrize("reference", ["models:/a", "models:/a@", "models:/a/latest", "models:/a/1@b", "a@b", "x"])
def test_a_reference_of_another_form_is_refused(store: str, reference: str) -> None:
    with pytest.raises(ConfigError, match="models:/NAME@ALIAS or models:/NAME/VERSION"):
        registry.find_version(store, reference)
    assert registry.is_reference(reference) == reference.startswith("models:/")


def test_a_folder_that_is_no_model_is_refused_before_anything_is_made(store: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors is absent"):
        registry.register_model(store, "never", str(tmp_path), tags={})
    (tmp_path / registry.WEIGHTS).write_bytes(b"x")
    (tmp_path / registry.CARD).write_text("{")
    with pytest.raises(CheckpointError, match=r"model\.json is no JSON"):
        registry.register_model(store, "never", str(tmp_path), tags={})
    names = [m.name for m in backend.client(store).search_registered_models()]
    assert "never" not in names


def test_names_and_aliases_that_mlflow_refuses(store: str, in_object_storage: str) -> None:
    with pytest.raises(ConfigError, match="refuses the model name 'a/b'"):
        registry.register_model(store, "a/b", in_object_storage, tags={})
    registry.register_model(store, "aliases", in_object_storage, tags={})
    for alias in ("v3", "latest", "a b"):
        with pytest.raises(ConfigError, match="alias"):
            registry.register_model(store, "aliases", in_object_storage, alias=alias, tags={})
    assert len(backend.client(store).search_model_versions("name = 'aliases'")) == 1  # nothing half-made
    with pytest.raises(ConfigError, match="models:/aliases/7"):
        registry.set_alias(store, "aliases", "champion", 7)


def test_files_that_were_moved_away_are_missed(store: str, in_object_storage: str) -> None:
    registry.register_model(store, "moved", in_object_storage, tags={})
    storage.remove(f"{in_object_storage}/{registry.CARD}")
    with pytest.raises(CheckpointError, match=r"models:/moved/1 is version 1.*there is no model\.json"):
        registry.resolve_model(store, "models:/moved/1")


def test_tags_hold_no_keys(store: str, in_object_storage: str) -> None:
    registry.register_model(store, "tags", in_object_storage, tags={"init": "s3://K:S@bucket/x?sig=1"})
    assert registry.find_version(store, "models:/tags/1").tags == {"init": "s3://bucket/x"}
