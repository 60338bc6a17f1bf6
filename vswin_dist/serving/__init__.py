"""Using a trained model: its portable files, predictions for video files, and the MLflow pyfunc model."""
