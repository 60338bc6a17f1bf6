"""Training: launch (Ray Train) -> loop -> engine (DeepSpeed), and the portable checkpoints."""
