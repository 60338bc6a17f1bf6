"""Video Swin Transformer: models, checkpoints of the whole family, and their counts.

Needs torch, numpy and safetensors alone (`vswin_dist.storage` only where a URL is given).
"""

from vswin_dist.models.parameter_roles import ParameterRole
from vswin_dist.models.swin.counting import count_macs, count_parameters
from vswin_dist.models.swin.model import VideoSwin, build_model
from vswin_dist.models.swin.presets import PRESETS
from vswin_dist.models.weights.inflate import break_time_symmetry, inflate
from vswin_dist.models.weights.layouts import export_state
from vswin_dist.models.weights.load_report import LoadReport
from vswin_dist.models.weights.pretrained import load_pretrained

__all__ = [
    "PRESETS",
    "LoadReport",
    "ParameterRole",
    "VideoSwin",
    "break_time_symmetry",
    "build_model",
    "count_macs",
    "count_parameters",
    "export_state",
    "inflate",
    "load_pretrained",
]
