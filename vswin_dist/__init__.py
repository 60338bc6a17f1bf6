"""vswin_dist: distributed training of Video Swin Transformer.

Importing this package imports nothing heavy; import the part you need, for instance
`from vswin_dist.models import build_model`.
"""

__version__ = "0.1.0"
