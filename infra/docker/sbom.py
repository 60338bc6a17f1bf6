"""List what an image holds as CycloneDX JSON on stdout: Python's packages, and Debian's where there is dpkg."""

import importlib.metadata
import json
import shutil
import subprocess
import sys
from typing import Any


def python_packages() -> list[dict[str, Any]]:
    """List the installed distributions."""
    found = {d.metadata["Name"].lower(): d for d in importlib.metadata.distributions()}
    return [
        {"type": "library", "name": name, "version": d.version, "purl": f"pkg:pypi/{name}@{d.version}"}
        for name, d in sorted(found.items())
    ]


def debian_packages() -> list[dict[str, Any]]:
    """List the installed packages of the system."""
    if not shutil.which("dpkg-query"):
        return []
    command = ["dpkg-query", "--show", "--showformat", "${Package} ${Version} ${Architecture}\n"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [
        {"type": "library", "name": name, "version": version, "purl": f"pkg:deb/debian/{name}@{version}?arch={architecture}"}
        for name, version, architecture in (line.split() for line in lines)
    ]


def main() -> int:
    bom = {"bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1}
    json.dump({**bom, "components": [*python_packages(), *debian_packages()]}, sys.stdout, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
