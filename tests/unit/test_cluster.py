"""What Ray Train is told to leave out."""

from __future__ import annotations

from ray.train import ScalingConfig

from vswin_dist.cluster import FittingTrainer


def test_no_process_is_started_that_may_ask_another_cluster_or_serves_datasets() -> None:
    """By the names of Ray's own callbacks: another release may have them elsewhere."""
    trainer = FittingTrainer(print, world_sizes=(1,), scaling_config=ScalingConfig(num_workers=1))
    names = {type(callback).__name__ for callback in trainer._create_default_callbacks()}
    assert names and not [name for name in names if "Cleaner" in name or "Datasets" in name], names
