"""Wait until Ray has all nodes of an allocation: `python wait_for_nodes.py --address HOST:PORT --within SECONDS NODE...`.

A node is known by its label `slurm-node`, as host.sh gives it. Exit code 1, and their names, where some have not joined in
time, or where the process that starts them has ended.
"""

import argparse
import os
import signal
import sys
import time


def joined(address: str) -> set[str]:
    """Return the names of the nodes that are there; none where Ray's head does not answer."""
    import ray

    try:
        if not ray.is_initialized():
            ray.init(address=address, logging_level="error", log_to_driver=False)
        return {node["Labels"].get("slurm-node", "") for node in ray.nodes() if node["Alive"]}
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, TimeoutError):
        return set()


def answers(address: str) -> bool:
    """Return True where something listens at the head's address, so that Ray need not be tried in vain."""
    import socket

    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except OSError:
        return False
    return True


def is_there(pid: int) -> bool:
    """Return True where a process runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("nodes", nargs="+", metavar="NODE", help="its name in Slurm")
    parser.add_argument("--address", required=True, metavar="HOST:PORT", help="of Ray's head")
    parser.add_argument("--within", type=float, required=True, metavar="SECONDS", help="how long it waits")
    parser.add_argument("--process", type=int, required=True, metavar="ID", help="of the process that starts Ray on them")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))  # not Ray's, which takes its time
    deadline, found = time.monotonic() + args.within, set[str]()
    while not (found := joined(args.address) if answers(args.address) else set()).issuperset(args.nodes):
        if time.monotonic() > deadline or not is_there(args.process):
            why = f"within {args.within:g} s" if is_there(args.process) else "before srun, which starts Ray, ended"
            absent = [name for name in args.nodes if name not in found]
            count = f"{len(args.nodes) - len(absent)} of {len(args.nodes)}"
            print(f"error: {count} nodes joined Ray {why}; absent: {', '.join(absent)}", file=sys.stderr)
            return 1
        time.sleep(1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
