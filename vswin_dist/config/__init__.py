"""Typed settings, recipes and dotted overrides."""

from vswin_dist.config.load import defaults, from_flat, load_settings, may_differ, recipe_names, recipe_text, to_flat
from vswin_dist.config.schema import Settings

__all__ = ["Settings", "defaults", "from_flat", "load_settings", "may_differ", "recipe_names", "recipe_text", "to_flat"]
