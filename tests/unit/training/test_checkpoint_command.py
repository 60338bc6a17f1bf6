"""`python -m vswin_dist.training.checkpoint`: what it lists, the damage that it finds, and models in other layouts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import checkpoints
from vswin_dist.errors import CheckpointError
from vswin_dist.model_card import ModelCard
from vswin_dist.models import build_model
from vswin_dist.models.weights.layouts import export_state
from vswin_dist.models.weights.pretrained import load_pretrained
from vswin_dist.training import checkpoint
from vswin_dist.training.checkpoint.__main__ import main

SETTINGS = {"name": "swin_nano", "num_classes": 2}
MOMENTS = "optimizer-00000.safetensors"


def save(root: Path, step: int, top1: float | None = None) -> Path:
    torch.manual_seed(step)
    weights = export_state(build_model(**SETTINGS), "native")
    position = checkpoint.Position(step, 1, 16, "run", "f" * 32, {}, [], {}, {} if top1 is None else {"val/top1": top1})
    moments = {"exp_avg.head.weight": torch.ones(2, 3)}
    return Path(checkpoints.save(str(root), position, weights, moments, ModelCard(SETTINGS, ["a", "b"], {}, {})))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with four checkpoints in its folder 0002, and one that is being written."""
    run = tmp_path_factory.mktemp("run")
    for step, top1 in ((1, 10.0), (2, 60.0), (3, None), (4, 20.0)):
        save(run / "0002", step, top1)
    checkpoint.keep_for_model(str(run / "0002" / "step-00000001"), "champions")
    (run / "0002" / "step-00000005").mkdir()
    (run / "0002" / "step-00000005" / "model.safetensors").write_bytes(b"half")
    (run / "run.json").write_text("{}")
    return run


def rows(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["checkpoint", "step", "epoch"]
    return {line.split()[0].split("/")[-1]: " ".join(line.split()[1:]) for line in lines}


def test_every_checkpoint_of_a_run_is_listed_with_its_scores(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", str(run)]) == main(["verify", str(run / "0002")]) == 0
    output = capsys.readouterr().out.splitlines()
    assert output[:6] == output[6:]
    assert main(["list", str(run)]) == 0
    size = sum(p.stat().st_size for p in (run / "0002" / "step-00000001").iterdir()) / 1e9
    found = rows(capsys)
    assert found == {
        "step-00000001": f"1 1 {size:.3f} 10.00 whole registered as champions",
        "step-00000002": f"2 1 {size:.3f} 60.00 whole best",
        "step-00000003": f"3 1 {size:.3f} - whole",
        "step-00000004": f"4 1 {size:.3f} 20.00 whole newest",
        "step-00000005": "- - 0.000 - not committed: being written, or cut off",
    }


def test_damage_is_found_by_reading_and_a_cut_by_listing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flipped, cut, apart = (save(tmp_path, step) for step in (1, 2, 3))
    data = bytearray((flipped / MOMENTS).read_bytes())
    data[-1] ^= 1
    (flipped / MOMENTS).write_bytes(data)
    assert main(["list", str(tmp_path)]) == 0
    (apart / "model.json").unlink()
    checkpoint.newest_whole(str(tmp_path))
    capsys.readouterr()
    assert main(["list", str(tmp_path)]) == 0, "what was set apart is dealt with"
    assert "set apart as damaged" in next(line for name, line in rows(capsys).items() if name.startswith("damaged-step"))
    assert main(["verify", str(tmp_path)]) == 1
    assert f"{MOMENTS} is damaged: sha256" in rows(capsys)["step-00000001"]
    (cut / "model.json").write_text("{}")
    assert main(["list", str(tmp_path)]) == 1
    assert "model.json has 2 bytes, expected" in rows(capsys)["step-00000002"]
    assert main(["verify", str(tmp_path), "--step", "1"]) == 1 and list(rows(capsys)) == ["step-00000001"]
    assert not list(tmp_path.rglob("loading-*"))


@pytest.mark.parametrize("layout", ["native", "official", "torchvision"])
def test_one_is_exported_to_a_layout_that_loads_again(run: Path, tmp_path: Path, layout: str) -> None:
    target = tmp_path / "model.safetensors"
    assert main(["export", str(run), str(target), "--layout", layout]) == 0
    kernel = {"native": "patch_embed.proj.weight", "torchvision": "patch_embed.proj.weight"}
    assert kernel.get(layout, "backbone.patch_embed.proj.weight") in load_file(target)
    model = build_model(**SETTINGS)
    load_pretrained(model, target)
    best = load_file(run / "0002" / "step-00000002" / "model.safetensors")
    found = export_state(model, "native")
    assert all(torch.equal(found[name], best[name]) for name in best)


def test_a_step_the_newest_and_a_folder_are_exported(run: Path, tmp_path: Path) -> None:
    for place, step, wanted in ((run, "1", 1), (run, "newest", 4), (run / "0002" / "step-00000003", "best", 3)):
        assert main(["export", str(place), str(tmp_path / "x"), "--step", step]) == 0
        weights = load_file(run / "0002" / f"step-{wanted:08d}" / "model.safetensors")
        assert torch.equal(load_file(tmp_path / "x")["head.weight"], weights["head.weight"])


def test_a_step_that_is_not_there_is_refused_where_there_is_one_alone(tmp_path: Path) -> None:
    save(tmp_path / "0001", 120)
    with pytest.raises(CheckpointError, match=r"no checkpoint 500 at .*: there are those of step 120$"):
        main(["export", str(tmp_path), str(tmp_path / "x"), "--step", "500"])
    assert not (tmp_path / "x").exists()
    renamed = (tmp_path / "0001" / "step-00000120").rename(tmp_path / "kept")
    assert main(["export", str(renamed), str(tmp_path / "x"), "--step", "120"]) == 0


def test_damaged_weights_are_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path, 1) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert main(["export", str(tmp_path), str(tmp_path / "x")]) == 1
    assert "model.safetensors is damaged" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_what_names_nothing_is_refused(run: Path, tmp_path: Path) -> None:
    for arguments, words in (
        (["list", str(tmp_path)], "no checkpoints at"),
        (["verify", str(run), "--step", "9"], "no checkpoint of step 9"),
        (["export", str(run), "x", "--step", "9"], "no checkpoint 9 at .*: there are those of step 1, 2, 3, 4, 5"),
    ):
        with pytest.raises(CheckpointError, match=words):
            main(arguments)
    for arguments in (["export", str(run), "x", "--step", "last"], ["export", str(run), "x", "--layout", "timm"], ["show"]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2


@pytest.mark.slow
def test_it_is_a_module_that_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vswin_dist.training.checkpoint", "list", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and ended.stderr.startswith("error: no checkpoints at ")
