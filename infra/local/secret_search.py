"""Every secret of a trial, looked for in all that others could read: files, what a server says, command lines."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Sequence
from pathlib import Path

import psutil

from infra.local import services
from infra.local.record import Record
from vswin_dist.errors import WorkFailed

NAMES = ("mlflow_admin", "mlflow_user")  # of accounts, which the file of secrets holds too


class SecretSearch:
    """Looks for secrets, and keeps the places that were looked at."""

    def __init__(self, secrets: Sequence[str]) -> None:
        self.secrets = list(secrets)
        self.places = 0
        self.wrong: list[str] = []  # which hold one

    @classmethod
    def of(cls, record: Record) -> SecretSearch:
        """Return a search for all secrets of a record's services."""
        made = services.all_secrets(record)
        return cls([made[name] for name in made if name not in NAMES])

    def below(self, folder: Path | str, *but: str, enter: Sequence[str] = ()) -> None:
        """Look through all files below a folder.

        Args:
            but: file names and, with a slash at their end, folder names that are left out: what is there in mode 600.
            enter: the command by which a host is entered, whose folder it is.
        """
        left_out = [f"--exclude-dir={name[:-1]}" if name.endswith("/") else f"--exclude={name}" for name in but]
        command = [*enter, "grep", "--recursive", "--count", "--text", "--fixed-strings", "--file=-", *left_out, str(folder)]
        done = subprocess.run(command, input="\n".join(self.secrets), capture_output=True, text=True, errors="replace")
        for line in done.stdout.splitlines():
            place, _, count = line.rpartition(":")
            self._looked_at(place, count != "0")

    def text(self, place: str, said: str) -> None:
        """Look through a text."""
        self._looked_at(place, any(secret in said for secret in self.secrets))

    def command_lines(self) -> None:
        """Look through the command lines of all processes of this machine."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                self.text(f"the command line of process {process.pid}", " ".join(process.cmdline()))

    def _looked_at(self, place: str, is_wrong: bool) -> None:
        self.places += 1
        if is_wrong:
            self.wrong.append(place)

    def check(self) -> str:
        """Say in how many places none was found.

        Raises:
            WorkFailed: one stands somewhere; names the places.
        """
        if self.wrong:
            raise WorkFailed(f"secrets stand in {', '.join(self.wrong)}")
        return f"none of {len(self.secrets)} in {self.places:,} files, command lines and answers"
