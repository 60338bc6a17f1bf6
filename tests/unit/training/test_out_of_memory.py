"""What is said where a device runs out of memory."""

from __future__ import annotations

import pytest
import torch

from vswin_dist.config import load_settings
from vswin_dist.device import Rank
from vswin_dist.errors import WorkFailed
from vswin_dist.training.out_of_memory import explained


def test_the_settings_that_would_fit_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is at hand to be filled: its size and its error are given."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 16 << 30))
    settings = load_settings("k400_swin_l", ["data.train=/none"])
    rank = Rank(3, 8, torch.device("cuda", 3))
    with pytest.raises(WorkFailed) as failed, explained(settings, 400, rank):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    text = str(failed.value)
    assert text.startswith("rank 3 ran out of the memory of cuda:3: CUDA out of memory.")
    assert "training.micro_batch=4" in text and "model.gradient_checkpointing=" in text and text.endswith(" fits.")


def test_other_errors_pass() -> None:
    settings, rank = load_settings("demo", ["data.train=/none"]), Rank(0, 1, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="other"), explained(settings, 6, rank):
        raise RuntimeError("other")
