"""Stop the jobs of this head in order, before its container is ended: `python stop_jobs.py --within SECONDS`.

Each gets the signal of `ray job stop`, at which a training writes a checkpoint. Returns when all have ended; exit code 1
where some have not in time. The token is that of RAY_AUTH_TOKEN, as in every process of a Ray host.
"""

import argparse
import json
import os
import sys
import time
import urllib.request
from typing import Any

ENDED = ("STOPPED", "SUCCEEDED", "FAILED")


def call(dashboard: str, method: str, path: str) -> Any:
    """Ask the job server; its answer."""
    headers = {"Authorization": f"Bearer {token}"} if (token := os.environ.get("RAY_AUTH_TOKEN")) else {}
    request = urllib.request.Request(f"{dashboard}{path}", method=method, headers=headers)  # noqa: S310 # http
    with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
        return json.load(answer)


def unfinished(dashboard: str) -> list[str]:
    """List the submissions that have not ended."""
    jobs = call(dashboard, "GET", "/api/jobs/")
    return [job["submission_id"] for job in jobs if job["submission_id"] and job["status"] not in ENDED]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--within", type=float, required=True, metavar="SECONDS", help="how long it waits")
    parser.add_argument("--dashboard", default="http://127.0.0.1:8265", metavar="URL", help="(%(default)s)")
    args = parser.parse_args()
    deadline = time.monotonic() + args.within
    try:
        jobs = unfinished(args.dashboard)
        for job in jobs:
            print(f"stopping {job}", flush=True)
            call(args.dashboard, "POST", f"/api/jobs/{job}/stop")
        while jobs and time.monotonic() < deadline:
            time.sleep(1)
            jobs = unfinished(args.dashboard)
    except (OSError, ValueError) as error:
        print(f"{args.dashboard}: {error}")
        return 1
    if jobs:
        print(f"not ended within {args.within:g} s: {', '.join(jobs)}")
    return 1 if jobs else 0


if __name__ == "__main__":
    sys.exit(main())
