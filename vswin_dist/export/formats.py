"""The forms that a model can take: how each is written, and how those read it who use it.

Shapes: B = clips, T, H, W = frames and pixels of a clip, K = classes.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vswin_dist.errors import ConfigError, PreflightError
from vswin_dist.export import hugging_face
from vswin_dist.export.subject import TRACED, Subject
from vswin_dist.model_card import CARD, card_bytes
from vswin_dist.models import build_model, export_state
from vswin_dist.models.swin.traceable import Traceable
from vswin_dist.models.weights.layouts import KERNEL, to_native, unwrap
from vswin_dist.models.weights.portable import load_model

INPUT, OUTPUT, BATCH = "clips", "logits", "batch"
ONNX_BYTES = 2 << 30  # of one file, by its encoding
OPSET = 20  # the first with GELU

Classifier = Callable[[Tensor], Tensor]  # clips float32 [B, 3, T, H, W] -> logits [B, K]


@dataclass(frozen=True)
class Format:
    """A form: a file with the ending `suffix`, or a folder (`""`).

    `write` fills the path, and `read` opens it as a classifier, with nothing from the subject but what its users have.
    """

    what: str
    suffix: str
    write: Callable[[Subject, Path], None]
    read: Callable[[Subject, Path], Classifier]
    packages: tuple[str, ...] = ()  # that it needs, of the extra `export`

    def check_packages(self, name: str) -> None:
        """Refuse the form `name` where a package that it needs is absent.

        Raises:
            PreflightError: names those packages and the extra that brings them.
        """
        if absent := [package for package in self.packages if importlib.util.find_spec(package) is None]:
            raise PreflightError(
                f"--to {name} needs {', '.join(self.packages)}, of which {', '.join(absent)} "
                f"{'is' if len(absent) == 1 else 'are'} not installed: pip install 'vswin_dist[export]'"
            )


def trace(subject: Subject) -> torch.export.ExportedProgram:
    """Trace the model for clips of its shape, and for the number of them or for any."""
    clips = subject.clips
    shapes = None if clips.batch else {INPUT: {0: torch.export.Dim(BATCH, min=1)}}
    with torch.no_grad():
        example = (clips.draw(clips.batch or TRACED),)
        return torch.export.export(Traceable(subject.model, clips.shape), example, dynamic_shapes=shapes)


def write_program(subject: Subject, path: Path) -> None:
    """Write a program of `torch.export`, with the card as the file `model.json` in it."""
    torch.export.save(trace(subject), path, extra_files={CARD: card_bytes(subject.card).decode()})


def read_program(subject: Subject, path: Path) -> Classifier:
    """Open a program of `torch.export`."""
    module: Classifier = torch.export.load(path).module()
    return module


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what torch's exporter says of packages that are not there and of its own deprecated calls."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        log.setLevel(level)


def write_onnx(subject: Subject, path: Path) -> None:
    """Write one ONNX file, with the card in its metadata.

    Raises:
        ConfigError: the weights do not fit into one file.
    """
    size = sum(p.numel() * p.element_size() for p in subject.model.parameters())
    if size >= ONNX_BYTES:
        raise ConfigError(f"--to onnx: an ONNX file holds less than {ONNX_BYTES} bytes, the weights have {size}")
    # The exporter writes the attention out, and takes the layout in memory that a fused one would answer in for its.
    with _quiet(), sdpa_kernel(SDPBackend.MATH):
        program = torch.onnx.export(
            trace(subject),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=None if subject.clips.batch else {INPUT: {0: BATCH}},  # for its name alone: it is traced
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props[CARD] = card_bytes(subject.card).decode()
    program.save(path, external_data=False)


def read_onnx(subject: Subject, path: Path) -> Classifier:
    """Open an ONNX file in ONNX Runtime, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def classify(clips: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: clips.numpy()})[0])

    return classify


def write_layout(layout: str, key: str | None, subject: Subject, path: Path) -> None:
    """Write the weights under another project's names as a torch file, in a dict under `key` where that project does.

    Raises:
        ConfigError: the layout cannot hold the model.
    """
    state: dict[str, Any] = dict(export_state(subject.model, layout))
    if key is not None:
        state = {key: state, "meta": {"CLASSES": tuple(subject.card.classes)}}
    torch.save(state, path)


def read_layout(layout: str, subject: Subject, path: Path) -> Classifier:
    """Build the model as the other project does, and load a file of weights under its names.

    The video projects index bias tables by `official` where a window is clamped, whatever the model was trained with.
    """
    indexing = {"bias_index": "official"} if layout in ("official", "torchvision") else {}
    model = build_model(**{**subject.model.settings, **indexing}).eval()
    state, _ = unwrap(torch.load(path, weights_only=True), str(path))
    named = {to_native(name, layout): tensor for name, tensor in state.items()}
    if named[KERNEL].dim() == 4:
        named[KERNEL] = named[KERNEL].unsqueeze(2)
    model.load_state_dict({name: tensor for name, tensor in named.items() if not name.endswith("_index")})
    return model


def read_folder(subject: Subject, path: Path) -> Classifier:
    """Load the model of a folder for Hugging Face, as the jobs of this project do."""
    return load_model(str(path))[0]


def _layout(layout: str, key: str | None, what: str) -> Format:
    return Format(what, ".pth", partial(write_layout, layout, key), partial(read_layout, layout))


FORMATS = {
    "torch-export": Format("a program of torch.export", ".pt2", write_program, read_program),
    "onnx": Format("ONNX", ".onnx", write_onnx, read_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "official": _layout("official", "state_dict", "weights for the published video code"),
    "torchvision": _layout("torchvision", None, "weights for torchvision's swin3d models"),
    "microsoft-2d": _layout("microsoft2d", "model", "weights of an image model for Microsoft's code"),
    "timm-2d": _layout("timm2d", None, "weights of an image model for timm"),
    "huggingface": Format("a folder for Hugging Face", "", hugging_face.write_folder, read_folder),
}
