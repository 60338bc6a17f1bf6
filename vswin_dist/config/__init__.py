"""Typed settings, recipes and dotted overrides."""

from vswin_dist.config.load import from_flat, load_settings, recipe_names, recipe_text, to_flat
from vswin_dist.config.schema import Settings

__all__ = ["Settings", "from_flat", "load_settings", "recipe_names", "recipe_text", "to_flat"]
