"""The code that a registered model brings: the modules that its own file imports, directly or not, and no others.

Each file is a request, and a server with accounts checks a password at each: the whole package took it most of a minute.
"""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path


def copy_needed(start: Path, package: Path, folder: Path) -> Path:
    """Copy the modules of `package` that running the file `start` may import into `folder`; returns the package there."""
    target = folder / package.name
    for file in needed(start, package):
        copy = target / file.relative_to(package)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    return target


def needed(start: Path, package: Path) -> set[Path]:
    """Find these modules: those of every import statement, also of one within a function, and the packages above them."""
    found = {package / "__init__.py"}
    waiting = [start, *found]
    while waiting:
        new = {file for name in _imports(waiting.pop()) for file in _files(name, package)} - found
        found |= new
        waiting += new
    return found


def _imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)  # a module, or a name in one


def _files(name: str, package: Path) -> Iterator[Path]:
    """Yield the files that importing `name` runs, where it is of the package."""
    first, *rest = name.split(".")
    place = package
    if first != package.name:
        return
    for part in rest:
        place = place / part
        yield from (file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file())
