"""Using a trained model: its portable files, predictions for video files, and the MLflow pyfunc model."""

from pathlib import Path

PYFUNC_CODE = Path(__file__).with_name("pyfunc_model.py")  # a file that MLflow runs, not a module to import
