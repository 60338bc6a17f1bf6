"""Where a run comes from: source, packages, settings; and what must never be logged."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

SOURCE_COMMIT = "VSWIN_SOURCE_COMMIT"
HIDDEN = "***"
_SKIPPED_FOLDERS = {"__pycache__", "node_modules", "build", "dist"}
# Anchored on the end of the name: `aws_secret_access_key`, `api-token`; not `tokens` or `keyframes`.
_SENSITIVE = r"(?:secret|password|passwd|credentials?|token|(?:access|api|account|private|secret)[_-]?key)"
_SECRET_NAME = re.compile(rf"(?i){_SENSITIVE}$")
_SECRET_LINE = re.compile(rf"(?im)(?P<head>{_SENSITIVE}[\"']?[ \t]*[:=][ \t]*)(?:\"[^\"\n]*\"|'[^'\n]*'|\S.*$)")
_URL_USER = re.compile(r"(?P<scheme>\b[a-zA-Z][\w+.\-]*://)[^\s/@\"']+@")
_URL_QUERY = re.compile(r"(?P<url>\b[a-zA-Z][\w+.\-]*://[^\s?\"'#]+)\?[^\s\"'#]*")
_AWS_KEY = re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b")


def redact(text: str) -> str:
    """`text` without what gives access: users and queries of URLs, values of `...secret:`-like lines, AWS key ids."""
    text = _URL_USER.sub(r"\g<scheme>", text)
    text = _URL_QUERY.sub(r"\g<url>", text)
    text = _SECRET_LINE.sub(rf"\g<head>{HIDDEN}", text)
    return _AWS_KEY.sub(HIDDEN, text)


def flatten(settings: Any, prefix: str = "") -> dict[str, str]:
    """Nested settings (a dataclass or mappings) as `group.field` -> text, redacted.

    Lists become JSON, None becomes `null`; a field whose name says that it is a secret becomes `***`.
    """
    if is_dataclass(settings) and not isinstance(settings, type):
        settings = asdict(settings)
    flat: dict[str, str] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) or (is_dataclass(value) and not isinstance(value, type)):
            flat.update(flatten(value, f"{name}."))
        elif _SECRET_NAME.search(name) and value is not None:
            flat[name] = HIDDEN
        else:
            flat[name] = redact(value if isinstance(value, str) else json.dumps(value, default=str))
    return flat


def source_version(folder: str | Path) -> str:
    """Return what code this is: the commit passed at submission, else git's, else a hash of what was shipped.

    Returns:
        `VSWIN_SOURCE_COMMIT`; or the commit of a git checkout that tracks files of `folder`, with `-dirty` where
        tracked files differ from it; or `tree-` and the sha256 over the .py and .yaml files below `folder`.
    """
    if commit := os.environ.get(SOURCE_COMMIT):
        return commit
    if _git(folder, "ls-files", "--", "."):
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ".")
        if commit:
            return f"{commit}-dirty" if changed else commit
    return f"tree-{_tree_hash(Path(folder))}"


def _git(folder: str | Path, *command: str) -> str:
    """Return the output of a git command in `folder`; `""` where git, the checkout or the commit is absent."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _tree_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in _SKIPPED_FOLDERS and not f.startswith("."))
        for name in sorted(f for f in files if f.endswith((".py", ".yaml", ".yml"))):
            path = Path(root, name)
            content = path.read_bytes()
            digest.update(f"{path.relative_to(folder).as_posix()}\t{len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()


def package_versions() -> dict[str, str]:
    """`python`, and the version of every installed distribution, sorted by name."""
    found = {(d.metadata["Name"] or "").lower(): d.version for d in importlib.metadata.distributions()}
    found.pop("", None)
    return {"python": platform.python_version(), **dict(sorted(found.items()))}
