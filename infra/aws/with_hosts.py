"""Wait for hosts, then run a command in this process's place: `python with_hosts.py --hosts N --gpus 8 -- COMMAND`.

A training is refused where its hosts are not there. This asks for them by a placement group, at which the autoscaler
launches them; it is given back just before the command starts, long before idle hosts go. It ends with the job, so that
nothing keeps hosts that cost.
"""

import argparse
import os
import sys
import time

import ray
from ray.util.placement_group import placement_group, remove_placement_group


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, required=True, metavar="N")
    parser.add_argument("--gpus", type=int, default=0, metavar="N", help="that each must have free (%(default)s)")
    parser.add_argument("--cpus", type=int, default=1, metavar="N", help="that each must have free (%(default)s)")
    parser.add_argument("--within", type=float, default=1800.0, metavar="SECONDS", help="how long it waits (%(default)s)")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    args = parser.parse_args()
    words = args.words[1:] if args.words[:1] == ["--"] else args.words
    if not words:
        parser.error("no command is given")
    each = {"CPU": args.cpus} | ({"GPU": args.gpus} if args.gpus else {})
    began = time.monotonic()
    ray.init(log_to_driver=False)
    group = placement_group([each] * args.hosts, strategy="STRICT_SPREAD")
    if not group.wait(args.within):
        print(f"no {args.hosts} hosts with {each} free came within {args.within:g} s; what `ray status` says tells why")
        return 1
    print(f"{args.hosts} hosts with {each} free after {time.monotonic() - began:.0f} s", flush=True)
    remove_placement_group(group)
    ray.shutdown()
    os.execvp(words[0], words)  # noqa: S606 # signals are for the command


if __name__ == "__main__":
    sys.exit(main())
