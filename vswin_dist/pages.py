"""HTML pages that need nothing else than themselves, from Jinja2 templates over one base."""

from __future__ import annotations

from typing import Any


def render(template: str, package: str = "vswin_dist", **values: Any) -> str:
    """Render a template of `package`, whose `base.html` is that of this project unless it has its own."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined  # which only a process with a page needs

    pages = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("vswin_dist")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    pages.filters["thousands"] = lambda number: f"{number:,}"
    pages.filters["signed"] = lambda number: f"{number:+.2f}"
    return pages.get_template(template).render(**values)
