"""What each parameter of a model is to an optimizer: the model says it, whatever its tensors are named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["weight", "bias", "norm", "bias_table"]


@dataclass(frozen=True)
class ParameterRole:
    """Part, depth and kind of one parameter.

    `part`: the backbone, or the head that is made for the classes.

    `depth`: 0 for the patch embedding, then one more with each block in the order of computation, temporal blocks
    included; what stands between blocks (the merging after a stage, the last norm) has the depth of the block before
    it. The head is last, one more than the last block. A layer-wise decay gives a parameter the learning-rate factor
    `decay ** (depth of the head - depth)`, as timm's `param_groups_layer_decay` does.

    `kind`: `norm`, weight or bias of a LayerNorm; `bias_table`, relative position biases; `bias`, any other vector or
    scalar; `weight`, all else.
    """

    part: Literal["backbone", "head"]
    depth: int
    kind: Kind
