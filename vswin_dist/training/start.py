"""What a training starts from: random weights, a checkpoint, or a registered model, inflated ones among them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from vswin_dist import models, storage
from vswin_dist.config import Settings
from vswin_dist.models import LoadReport
from vswin_dist.serving.export import write_model
from vswin_dist.tracking import provenance, registry
from vswin_dist.tracking.run import tracking_uri


def model_overrides(s: Settings) -> dict[str, Any]:
    """The arguments of `build_model` that a recipe sets."""
    chosen = {"patch_size": s.model.patch_size, "window_size": s.model.window_size}
    return {k: v for k, v in chosen.items() if v is not None} | {
        "drop_path_rate": s.model.drop_path_rate, "head_dropout": s.model.head_dropout,
        "attention_design": s.model.attention_design, "shift": s.model.shift, "bias_index": s.model.bias_index,
        "gradient_checkpointing": s.model.gradient_checkpointing, "compile": s.model.compile,
        "attention_kernel": s.model.attention_kernel}


def pinned(init: str | None, uri: str) -> str | None:
    """`init` with an alias replaced by the version that it means now: an alias may move while a training runs."""
    return registry.find_version(uri, init).uri if init and registry.is_reference(init) else init


def initial_weights(init: str, uri: str) -> str:
    """The file that `model.init` means: of a registered model in the store `uri`, or as it stands."""
    if not registry.is_reference(init):
        return init
    folder, _ = registry.resolve_model(uri, init)
    return storage.join(folder, registry.WEIGHTS)


def be_deterministic() -> None:
    """Have PyTorch take algorithms that give the same bits again, in this process; before the GPU is used.

    Without it, on a GPU, the gradients of the bias tables are summed by atomics (not by the Triton kernels), and so are some
    of attention and of the products.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # all of it is written before it is read


def initial_model(s: Settings, num_classes: int, uri: str) -> tuple[models.VideoSwin, LoadReport | None]:
    """The model before the first step, the same on every rank: from the seed, then from `model.init`."""
    torch.manual_seed(s.run.seed)
    model = models.build_model(s.model.name, num_classes=num_classes, **model_overrides(s))
    if not s.model.init:
        return model, None
    return model, load(model, initial_weights(s.model.init, uri), s)


def load(model: models.VideoSwin, path: str, s: Settings, dry_run: bool = False) -> LoadReport:
    """Load the checkpoint at `path`, inflated as the recipe says where it is of 2D; see `models.load_pretrained`."""
    report = models.load_pretrained(model, path, embedding=s.model.inflate_embedding, bias=s.model.inflate_bias,
                                    dry_run=dry_run)
    if s.model.inflate_noise and not dry_run and report.counts()["inflated"]:
        models.break_time_symmetry(model, s.model.inflate_noise, s.run.seed)
    return report


def register_inflated(weights: str, s: Settings, name: str, alias: str) -> tuple[int, LoadReport]:
    """Inflate the 2D checkpoint `weights` to the recipe's model and register it.

    The head keeps no class names, and the card no preprocessing: a training decides both.

    Returns:
        (version, what became of every tensor).

    Raises:
        CheckpointError: the checkpoint is no 2D Swin, or does not fit the recipe's model (names both shapes).
    """
    storage.use_s3_endpoint(s.storage.s3_endpoint)
    uri = tracking_uri(s.tracking.uri)
    source = storage.absolute(weights)
    torch.manual_seed(s.run.seed)
    model = models.build_model(s.model.name, **model_overrides(s))
    report = load(model, source, s)
    lineage = {"inflated_from": provenance.redact(source),
               "source_commit": provenance.source_version(Path(__file__).parents[2]), "recipe": s.recipe}
    with tempfile.TemporaryDirectory(prefix="vswin-inflate-") as folder:
        write_model(folder, model, classes=[], preprocessing={}, lineage=lineage)
        return registry.register_model(uri, name, folder, alias=alias, tags=lineage), report
