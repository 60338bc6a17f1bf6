"""The code of a pyfunc model that nobody loads, for tests of the registry: the real one takes seconds to import."""

from __future__ import annotations

import mlflow


class NoModel(mlflow.pyfunc.PythonModel):
    """MLflow runs this file when the model is registered."""

    def predict(self, context, model_input, params=None):
        raise NotImplementedError


mlflow.models.set_model(NoModel())
