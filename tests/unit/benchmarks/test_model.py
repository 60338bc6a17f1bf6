"""The benchmark of models: its rows, its verdicts, and a peak of memory that no other process can colour."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from vswin_dist.benchmarks import model
from vswin_dist.errors import ConfigError

SHAPE = ["swin_nano", "--threads", "1", "--clip", "4", "32", "32", "--repeats", "1", "--no-peers"]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_rows_of_one_run(capsys: pytest.CaptureFixture[str]) -> None:
    held = torch.ones(1 << 28)  # a gigabyte here must not show as memory of the models
    settings = ["--set", "num_classes=3", "--set", "shift=none", "--also", "gradient_checkpointing=block"]
    assert model.main([*SHAPE, *settings]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert [row["model"] for row in result["rows"]] == ["swin_nano", "swin_nano gradient_checkpointing=block"]
    assert result["overrides"] == {"num_classes": 3, "shift": "none"}
    for row in result["rows"]:
        assert 0 < row["peak_bytes"] < held.nbytes // 2
        assert row["clips_per_s"] == pytest.approx(1 / row["step_s"])
    assert len(table) == 4


def test_verdicts() -> None:
    def row(model: str, step: float | None, peak: float | None, utilisation: float | None) -> dict:
        return {"model": model, "step_s": step, "peak_bytes": peak, "utilisation": utilisation}

    rows = [
        row("swin_l", 1.0, 40.0, 0.4),
        row("swin_l gradient_checkpointing=block", 1.2, 12.0, 0.3),
        row("torchvision", 2.5, 60.0, 0.2),
    ]
    *ratios, choice = model.gpu_claims({"rows": rows}).splitlines()
    assert [line.split(": ")[1][:4] for line in ratios] == ["2.50", "0.40", "0.20"]
    assert choice == "fastest attention kernel: not measured"
    rows[2] = row("torchvision", None, None, None)  # did not fit
    rows += [
        row("swin_l compile=true", 0.8, 20.0, 0.5),
        row("swin_l attention_kernel=plain", 1.1, 20.0, 0.4),
        row("swin_l attention_kernel=plain compile=true", 1.0, 20.0, 0.4),
    ]
    claims = model.gpu_claims({"rows": rows})
    assert claims.count("not measured") == 2
    assert "fastest attention kernel: triton, 1.25 times plain (in 'swin_l compile=true')" in claims


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--set", "shift"], "key=value"), (["--set", "shfit=none"], "shift"), (["--device", "tpu"], "cpu")],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model.main([*SHAPE, *arguments])
