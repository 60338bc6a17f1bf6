"""Wait until no rank or task runs on this host, before its container is ended: `python wait_for_ranks.py --within SECONDS`.

Where a whole cluster is deleted its head stops the jobs meanwhile (stop_jobs.py), and the ranks write their checkpoint;
where this host alone goes, they train on until the time is over. Exit code 1 where some are left.
"""

import argparse
import sys
import time
from pathlib import Path

# Processes that Ray names so, and that are there without any work
WORKLESS = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")


def working() -> list[str]:
    """List the processes of Ray on this host that do the work of a job, by their names."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                name = (folder / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
            except OSError:  # it ended just now
                continue
            if name.startswith("ray::") and not name.startswith(WORKLESS):
                found.append(name.strip())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--within", type=float, required=True, metavar="SECONDS", help="how long it waits")
    args = parser.parse_args()
    deadline = time.monotonic() + args.within
    while (left := working()) and time.monotonic() < deadline:
        time.sleep(0.5)
    if left:
        print(f"still at work after {args.within:g} s: {', '.join(sorted(set(left)))}")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
