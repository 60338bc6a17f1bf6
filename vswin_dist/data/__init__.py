"""Feeding the model: the plan, decoding, sampling, transforms and the loader."""
