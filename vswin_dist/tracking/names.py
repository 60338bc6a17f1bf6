"""Names in a tracking store: what a job will use there, and the rules that MLflow has for them.

The rules are said here since a store that is still to be made cannot be asked; `tests/integration/test_tracking_names.py`
holds them against MLflow's own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vswin_dist.errors import ConfigError

MAX_EXPERIMENT = 500  # characters
MAX_MODEL = 256  # characters of the column in MLflow's databases; sqlite alone would take more
_ALIAS = re.compile(r"(?!v\d+$|latest$)[\w\-]{1,255}", re.IGNORECASE)
_NOT_LOGGED = re.compile(r"[/:.%\"']")  # of a registered model's name, what MLflow refuses in that of its files


@dataclass(frozen=True)
class Names:
    """What a job will use of a store, of each kind one or none."""

    experiment: str | None = None
    run_id: str | None = None  # of a run that is there, which it reopens
    model: str | None = None  # a registered model, of which it makes a version
    alias: str | None = None

    def check(self) -> None:
        """Refuse what MLflow refuses whatever the store holds.

        Raises:
            ConfigError: names the first.
        """
        if self.experiment is not None and not 0 < len(self.experiment) <= MAX_EXPERIMENT:
            raise ConfigError(
                f"MLflow refuses the experiment {self.experiment!r} of {len(self.experiment)} characters: "
                f"name one of 1 to {MAX_EXPERIMENT} in tracking.experiment"
            )
        if self.model is not None and not _is_model_name(self.model):
            raise ConfigError(
                f"MLflow refuses the model name {self.model!r}: 1 to {MAX_MODEL} characters other than '/' and ':', "
                "not blanks alone, not '.', and no '..' in front. Choose another in tracking.register_as or --register"
            )
        if self.alias is not None and not _ALIAS.fullmatch(self.alias):
            raise ConfigError(
                f"MLflow refuses the alias {self.alias!r}: letters, digits, _ and - are allowed; `latest` and "
                "forms like `v3` are reserved"
            )


def of_files(model: str) -> str:
    """Return the name that MLflow takes for the files of a version of `model`: a label, by which nothing is found."""
    return _NOT_LOGGED.sub("-", model)


def _is_model_name(name: str) -> bool:
    plain = bool(name.strip()) and len(name) <= MAX_MODEL and not set("/:") & set(name)
    return plain and name != "." and not name.startswith("..")
