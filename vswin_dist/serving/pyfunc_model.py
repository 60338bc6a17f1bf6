"""The file that MLflow runs to load a registered model (models from code); see `tracking.registry`.

Input: a DataFrame whose column `video` has paths or URLs of video files, or what stands in them, as base64 or bytes.
Output: a DataFrame with the columns `video`, `class`, `probability`, `top5_classes`, `top5_probabilities` and `error`, one
row for each video. Where one cannot be read or decoded, `error` says why, and the others are empty.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from vswin_dist.errors import DataError, StorageError
from vswin_dist.models.weights.portable import load_model
from vswin_dist.serving.predict import Predictor
from vswin_dist.serving.sources import name_of
from vswin_dist.tracking.backend import mlflow
from vswin_dist.tracking.registry import WEIGHTS_AT

COLUMNS = ("video", "class", "probability", "top5_classes", "top5_probabilities", "error")


class VideoSwinModel(mlflow().pyfunc.PythonModel):  # type: ignore[misc]
    """Video Swin Transformer with its preprocessing: video files to classes."""

    def load_context(self, context: Any) -> None:
        """Load the weights and the card: from where the version says, or as MLflow has put them side by side."""
        elsewhere = (context.model_config or {}).get(WEIGHTS_AT)
        network, card = load_model(elsewhere or str(Path(context.artifacts["weights"]).parent))
        self.predictor = Predictor(network, card)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """See the module's docstring."""
        rows = [self._row(video) for video in model_input["video"]]
        return pd.DataFrame(rows, columns=list(COLUMNS), dtype=object)  # whose None is JSON's null

    def _row(self, video: object) -> tuple[Any, ...]:
        try:
            best = self.predictor.best(self.predictor.probabilities(video))
        except (DataError, StorageError) as error:
            return name_of(video), None, None, [], [], str(error)
        names, values = zip(*best, strict=True)
        return name_of(video), names[0], values[0], list(names), list(values), None


mlflow().models.set_model(VideoSwinModel())
