from __future__ import annotations

import json
from pathlib import Path

import pytest

from vswin_dist import lease, model_card, storage
from vswin_dist.errors import CheckpointError, ConfigError, FencedOut
from vswin_dist.lease import Fence
from vswin_dist.tracking import CANDIDATE, INFLATED, NONE, ModelVersion, Registry, backend, is_reference, run

PYFUNC = Path(__file__).parents[2] / "support" / "no_model.py"


@pytest.fixture
def in_object_storage(tmp_path: Path) -> str:
    """A model's files at a URL (never copied, so what they hold does not matter)."""
    url = f"memory://models/{tmp_path.name}"
    storage.put_bytes(f"{url}/{model_card.WEIGHTS}", b"weights")
    storage.put_bytes(f"{url}/{model_card.CARD}", json.dumps({"settings": {}}).encode())
    return url


def test_a_model_at_a_url_is_registered_without_a_copy(store: str, in_object_storage: str) -> None:
    run_id = run.open_run(store, "exp", "train").id
    tags = {"dataset_fingerprint": "f" * 32, "top1": 0.5, "inflated_from": None}
    assert (
        Registry(store).register("large", in_object_storage, alias="champion", tags=tags, pyfunc=PYFUNC, run_id=run_id)
        == "models:/large/1"
    )
    assert (
        Registry(store).register("large", in_object_storage, alias="champion", tags={}, pyfunc=PYFUNC) == "models:/large/2"
    )
    folder, version = Registry(store).resolve("models:/large/1")
    assert folder == in_object_storage
    assert version == ModelVersion(
        "large",
        1,
        run_id,
        {"dataset_fingerprint": "f" * 32, "top1": "0.5", "training_run": run_id, "weights_at": in_object_storage},
        (),
        model_id=version.model_id,
    )
    assert version.model_id
    assert version.uri == "models:/large/1"
    champion = Registry(store).find("models:/large@champion")
    assert (champion.version, champion.aliases, champion.run_id) == (2, ("champion",), None)


def test_what_does_not_exist_is_answered_with_what_does(store: str, in_object_storage: str) -> None:
    for alias in ("champion", "candidate"):
        Registry(store).register("k400-swin-b", in_object_storage, alias=alias, tags={}, pyfunc=PYFUNC)
    with pytest.raises(CheckpointError, match=r"k400-swin-b.*Did you mean 'k400-swin-b'"):
        Registry(store).resolve("models:/k400-swin-l@champion")
    with pytest.raises(
        CheckpointError,
        match=r"candidate \(version 2\), champion \(version 1\) and the versions 1 to 2"
        r"\. Did you mean 'champion'",
    ):
        Registry(store).resolve("models:/k400-swin-b@champoin")
    with pytest.raises(CheckpointError, match=r"models:/k400-swin-b/9 does not exist.*versions 1 to 2"):
        Registry(store).resolve("models:/k400-swin-b/9")


@pytest.mark.parametrize("reference", ["models:/a", "models:/a@", "models:/a/latest", "models:/a/1@b", "a@b", "x"])
def test_a_reference_of_another_form_is_refused(store: str, reference: str) -> None:
    with pytest.raises(ConfigError, match="models:/NAME@ALIAS or models:/NAME/VERSION"):
        Registry(store).find(reference)
    assert is_reference(reference) == reference.startswith("models:/")


def test_a_folder_that_is_not_a_model_is_refused_before_anything_is_made(store: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors is absent"):
        Registry(store).register("never", str(tmp_path), tags={}, pyfunc=PYFUNC)
    (tmp_path / model_card.WEIGHTS).write_bytes(b"x")
    (tmp_path / model_card.CARD).write_text("{")
    with pytest.raises(CheckpointError, match=r"model\.json is not JSON"):
        Registry(store).register("never", str(tmp_path), tags={}, pyfunc=PYFUNC)
    names = [m.name for m in backend.client(store).search_registered_models()]
    assert "never" not in names


def test_names_and_aliases_that_mlflow_refuses(store: str, in_object_storage: str) -> None:
    with pytest.raises(ConfigError, match="refuses the model name 'a/b'"):
        Registry(store).register("a/b", in_object_storage, tags={}, pyfunc=PYFUNC)
    Registry(store).register("aliases", in_object_storage, tags={}, pyfunc=PYFUNC)
    for alias in ("v3", "latest", "a b"):
        with pytest.raises(ConfigError, match="alias"):
            Registry(store).register("aliases", in_object_storage, alias=alias, tags={}, pyfunc=PYFUNC)
    assert len(backend.client(store).search_model_versions("name = 'aliases'")) == 1  # nothing half-made
    with pytest.raises(ConfigError, match="models:/aliases/7"):
        Registry(store).set_alias("aliases", "champion", 7)


def test_files_that_were_moved_away_are_missed(store: str, in_object_storage: str) -> None:
    Registry(store).register("moved", in_object_storage, tags={}, pyfunc=PYFUNC)
    storage.remove(f"{in_object_storage}/{model_card.CARD}")
    with pytest.raises(CheckpointError, match=r"models:/moved/1 is version 1.*there is no model\.json"):
        Registry(store).resolve("models:/moved/1")


def test_a_version_that_an_earlier_release_registered_where_its_files_are_is_found(
    store: str, in_object_storage: str, tmp_path: Path
) -> None:
    client = backend.client(store)
    client.create_registered_model(tmp_path.name)
    client.create_model_version(tmp_path.name, in_object_storage)
    assert Registry(store).folder(f"models:/{tmp_path.name}/1") == in_object_storage


def test_tags_hold_no_keys(store: str, in_object_storage: str) -> None:
    Registry(store).register("tags", in_object_storage, tags={"init": "s3://K:S@bucket/x?sig=1"}, pyfunc=PYFUNC)
    assert Registry(store).find("models:/tags/1").tags["init"] == "s3://bucket/x"


def test_without_a_store_a_model_is_its_folder(in_object_storage: str, tmp_path: Path) -> None:
    registry = Registry(NONE)
    assert registry.register("x", in_object_storage, tags={}, pyfunc=PYFUNC, alias="champion") == in_object_storage
    assert registry.folder(in_object_storage) == in_object_storage
    with pytest.raises(CheckpointError, match="is absent"):
        registry.register("x", str(tmp_path), tags={}, pyfunc=PYFUNC)
    for use in (registry.find, registry.resolve, registry.folder):
        with pytest.raises(ConfigError, match=r"^models:/x@champion: tracking\.uri=none has no registry of models"):
            use("models:/x@champion")
    with pytest.raises(ConfigError, match="has no registry"):
        registry.set_alias("x", "champion", 1)


@pytest.mark.slow
def test_the_first_trained_version_is_champion_at_once_and_later_ones_are_candidates(
    store: str, in_object_storage: str, tmp_path: Path
) -> None:
    name, registry = tmp_path.name, Registry(store)

    def register(alias: str, **tags: str) -> None:
        registry.register(name, in_object_storage, tags=tags, pyfunc=PYFUNC, alias=alias)

    register(INFLATED, inflated_from="a.pth")
    assert registry.aliases(name) == {"inflated": 1, "champion": 1}
    register(INFLATED, inflated_from="b.pth")
    assert registry.aliases(name) == {"inflated": 2, "champion": 2}, "trainings that start from it are to take the newest"
    register(CANDIDATE, training_run="r")
    assert registry.aliases(name) == {"inflated": 2, "candidate": 3, "champion": 3}
    new, old = registry.find(f"models:/{name}/3").tags, registry.find(f"models:/{name}/2").tags
    assert new["promoted_over"] == f"models:/{name}/2" and old["replaced_by"] == f"models:/{name}/3"
    assert new["promoted_at"] == old["replaced_at"] and "before any training" in new["promoted_because"]
    register(CANDIDATE, training_run="s")
    register(INFLATED, inflated_from="c.pth")
    assert registry.aliases(name) == {"inflated": 5, "candidate": 4, "champion": 3}
    assert "replaced_by" not in registry.find(f"models:/{name}/3").tags


def test_who_is_fenced_out_registers_nothing_and_moves_no_alias(store: str, in_object_storage: str, tmp_path: Path) -> None:
    name, how = tmp_path.name, {"tags": {}, "pyfunc": PYFUNC}
    for version in (1, 2):
        assert Registry(store).register(name, in_object_storage, **how) == f"models:/{name}/{version}"
    place = str(tmp_path / "lease")
    claims = [lease._claim(place, "the run", "wait", take_over=True) for _ in range(2)]
    first, second = (Registry(store, Fence(place, number, claim.id)) for number, claim in claims)
    two = first.find(f"models:/{name}/2")
    for forbidden in (
        lambda: first.register(name, in_object_storage, **how, alias=CANDIDATE),
        lambda: first.register_once(name, in_object_storage, pyfunc=PYFUNC, tags={"checkpoint": "x"}, since_ms=1),
        lambda: first.set_alias(name, CANDIDATE, 2),
        lambda: first.crown(two, None, "", {}),
    ):
        with pytest.raises(FencedOut, match="taken over"):
            forbidden()
    assert first.aliases(name) == {"champion": 1} and first.find(two.uri) == two
    assert len(backend.model_versions(store, name)) == 2
    second.crown(two, first.find(f"models:/{name}/1"), "better", {})
    assert first.aliases(name) == {"champion": 2}


def test_a_description_is_kept_in_the_length_that_databases_take_and_holds_no_keys(
    store: str, in_object_storage: str, tmp_path: Path
) -> None:
    registry = Registry(store)
    made = registry.register(
        tmp_path.name, in_object_storage, tags={}, pyfunc=PYFUNC, description="from s3://K:S@bucket/x\n" + 6000 * "a"
    )
    text = registry.find(made).description
    assert text.startswith("from s3://bucket/x\n") and len(text) == 5000 and text.endswith("a…\n")
    registry.describe(registry.find(made), "password: hush")
    assert registry.find(made).description == "password: ***"
