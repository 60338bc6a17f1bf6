"""What a validation has found of every video, as the file of the checkpoint that it was made of."""

from __future__ import annotations

from vswin_dist.evaluation.evaluate import Views
from vswin_dist.evaluation.predictions import Found, Predictions
from vswin_dist.manifest import Manifest

FILE = "validation.parquet"


def to_parquet(found: Found, manifest: Manifest, views: Views, step: int) -> bytes:
    """Encode what was found at `step`; the identity names no sums of the weights, which are not written yet."""
    identity = views.identity(manifest, weights=f"step {step}", card="", device="")
    return Predictions.of(identity, found, manifest).to_parquet()
