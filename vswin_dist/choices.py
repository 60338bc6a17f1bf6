"""Choices that the settings and the models share, free of torch."""

from typing import Literal

AttentionDesign = Literal["joint", "split", "factorized"]  # of space and time (paper, table 4)
Shift = Literal["3d", "spatial", "none"]  # of the windows (table 6)
BiasIndex = Literal["offset", "official"]  # of a window that is smaller than the bias table's
GradientCheckpointing = Literal["none", "block", "stage", "selective"]
AttentionKernel = Literal["auto", "plain", "triton"]  # of the windowed attention; auto: triton where it can
