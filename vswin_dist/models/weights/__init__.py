"""Weights in files: this project's own, those of other projects, and 2D weights inflated to 3D."""
