"""The state of a training on its way to a checkpoint: what each rank holds of it, and its copy in host memory.

A tensor that ranks hold in parts is written in parts, so that none of them waits for another: `exp_avg.NAME@START` is
the flat part of `exp_avg.NAME` from START on, whose whole shape stands in the file's metadata. `assemble` joins them.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from vswin_dist.errors import CheckpointError

AT = "@"
BYTES = 4  # of a value: all of them are fp32
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """What a rank holds of a tensor: the values from `start` on of the flattened tensor `name`, whose shape is `shape`."""

    name: str
    shape: Shape
    start: int
    values: Tensor

    @property
    def is_whole(self) -> bool:
        """True where it is all of the tensor."""
        return self.values.numel() == math.prod(self.shape)

    @property
    def key(self) -> str:
        """Its name in a file."""
        return self.name if self.is_whole else f"{self.name}{AT}{self.start}"


@dataclass(frozen=True)
class State:
    """What one rank gives to a checkpoint."""

    shapes: Mapping[str, Shape]  # of the weights
    weights: Iterable[tuple[str, Tensor]]  # all of them, full; every rank iterates to the end, together
    moments: Sequence[Part]  # those that this rank writes; each value is with one rank


class Image:
    """A safetensors file of fp32 tensors in host memory, which serves again for a file of the same layout.

    Args:
        pinned: the memory is page-locked, so that copies from a GPU go on while its host does.
    """

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._layout: tuple[dict[str, Shape], dict[str, str]] | None = None

    def lay_out(self, shapes: Mapping[str, Shape], metadata: Mapping[str, str]) -> None:
        """Make room for the tensors `shapes`, and write the header before them."""
        layout = (dict(shapes), dict(metadata))
        if layout == self._layout:
            return
        header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
        spans: dict[str, tuple[int, int]] = {}
        end = 0
        for name, shape in shapes.items():
            spans[name] = (end, end := end + BYTES * math.prod(shape))
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": spans[name]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        self._memory = torch.empty(0, dtype=torch.uint8)  # the earlier goes first
        self._memory = torch.empty(start + end, dtype=torch.uint8, pin_memory=self._pinned)
        self._memory[:start] = torch.frombuffer(bytearray(struct.pack("<Q", len(text)) + text), dtype=torch.uint8)
        self._places = {n: self._memory[start + a : start + b].view(torch.float32) for n, (a, b) in spans.items()}
        self._layout = layout

    def put(self, name: str, values: Tensor) -> None:
        """Copy a tensor to its place; from a GPU, the copy may be under way when this returns."""
        self._places[name].copy_(values.reshape(-1), non_blocking=True)

    @property
    def content(self) -> memoryview:
        """The file."""
        return memoryview(self._memory.numpy())  # type: ignore[arg-type] # which numpy says from 3.12 on


def assemble(paths: Iterable[Path]) -> dict[str, Tensor]:
    """Load the tensors of several files, and join those that are in parts.

    Raises:
        CheckpointError: a part is absent.
    """
    found: dict[str, Tensor] = {}
    filled: dict[str, int] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            shapes = {name: json.loads(text) for name, text in (file.metadata() or {}).items() if name != "format"}
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                name, at, start = key.partition(AT)
                values = file.get_tensor(key)
                if not at:
                    found[name] = values
                    continue
                whole = found.setdefault(name, torch.empty(shapes[name]))
                whole.view(-1)[int(start) : int(start) + len(values)] = values
                filled[name] = filled.get(name, 0) + len(values)
    for name, count in filled.items():
        if count != found[name].numel():
            raise CheckpointError(f"{count} of the {found[name].numel()} values of {name} are there: a file is missing")
    return found
