"""Print cluster.yaml with the outputs of the stack put in: `python -m infra.aws.configure --stack vswin > cluster.yaml`.

Overlays (overlays/*.yaml) are laid over it: mappings are merged, all else is replaced, and null takes a key away.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vswin_dist.errors import ConfigError, run_command

FOLDER = Path(__file__).parent
NAME = re.compile(r"\$\{(\w+)\}")
OVERLAYS = sorted(path.stem for path in (FOLDER / "overlays").glob("*.yaml"))


def read(path: Path, values: Mapping[str, str]) -> Any:
    """Read a YAML file with `values` put in for its `${NAMES}`.

    Raises:
        ConfigError: there is none for a name.
    """

    def value(found: re.Match[str]) -> str:
        if found[1] not in values:
            raise ConfigError(f"{path.name} needs {found[1]}, which is no output of the stack: {', '.join(sorted(values))}")
        return values[found[1]]

    lines = path.read_text().splitlines(keepends=True)
    return yaml.safe_load("".join(line if line.startswith("#") else NAME.sub(value, line) for line in lines))


def merge(below: Any, above: Any) -> Any:
    """Return `above` laid over `below`."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    merged = below | {key: merge(below.get(key, {}), value) for key, value in above.items()}
    return {key: value for key, value in merged.items() if value is not None}


def cluster(values: Mapping[str, str], overlays: Sequence[Path] = ()) -> dict[str, Any]:
    """Return the configuration of a cluster.

    Args:
        values: outputs of the stack.
    """
    made = read(FOLDER / "cluster.yaml", values)
    for overlay in overlays:
        made = merge(made, read(overlay, values))
    return dict(made)


def outputs(stack: str, region: str | None) -> dict[str, str]:
    """Ask CloudFormation for the outputs of a stack.

    Raises:
        ConfigError: there is no such stack, or it cannot be asked for.
    """
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        found = boto3.client("cloudformation", region).describe_stacks(StackName=stack)["Stacks"][0]
    except (BotoCoreError, ClientError) as error:
        raise ConfigError(f"the stack {stack!r} cannot be read: {error}") from error
    return {one["OutputKey"]: one["OutputValue"] for one in found.get("Outputs", [])}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stack", required=True, metavar="NAME", help="made of stack.yaml")
    parser.add_argument("--region", metavar="NAME", help="(that of AWS's settings)")
    parser.add_argument("--overlay", action="append", default=[], choices=OVERLAYS, help="can be given more than once")
    args = parser.parse_args()
    files = [FOLDER / "overlays" / f"{name}.yaml" for name in args.overlay]
    yaml.safe_dump(cluster(outputs(args.stack, args.region), files), sys.stdout, sort_keys=False, width=1000)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
