"""The file that MLflow runs to load a registered model (models from code); see `tracking.registry`.

Input: a DataFrame whose column `video` has paths or URLs of video files. Output: a DataFrame with the columns `video`,
`class`, `probability`, `top5_classes` and `top5_probabilities`, one row for each video.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from vswin_dist.serving.export import load_model
from vswin_dist.serving.predict import Predictor
from vswin_dist.tracking.backend import mlflow


class VideoSwinModel(mlflow().pyfunc.PythonModel):  # type: ignore[misc]
    """Video Swin Transformer with its preprocessing: video files to classes."""

    def load_context(self, context: Any) -> None:
        """Load the weights and the card, which MLflow has put side by side."""
        network, card = load_model(str(Path(context.artifacts["weights"]).parent))
        self.predictor = Predictor(network, card)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """See the module's docstring; raises DataError for a file that cannot be decoded."""
        rows = []
        for found in self.predictor.predict(model_input["video"]):
            names, values = zip(*found.top, strict=True)
            rows.append({"video": found.video, "class": names[0], "probability": values[0],
                         "top5_classes": list(names), "top5_probabilities": list(values)})
        return pd.DataFrame(rows)


mlflow().models.set_model(VideoSwinModel())
