"""Video Swin Transformer: models, checkpoints of the whole family, and their counts.

Needs torch, numpy and safetensors alone (`vswin_dist.storage` only where a URL is given).
"""

from .counting import count_macs, count_parameters
from .inflate import break_time_symmetry, inflate
from .layouts import export_state
from .presets import PRESETS
from .pretrained import load_pretrained
from .report import LoadReport
from .swin3d import VideoSwin, build_model

__all__ = [
    "PRESETS",
    "LoadReport",
    "VideoSwin",
    "break_time_symmetry",
    "build_model",
    "count_macs",
    "count_parameters",
    "export_state",
    "inflate",
    "load_pretrained",
]
