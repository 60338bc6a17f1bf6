"""Prepare videos on the cluster: `ray job submit --working-dir . -- python jobs/prepare.py SOURCE ...`.

Takes what follows `data-prep shard`; without `--ray ADDRESS` it works on the cluster that it runs in.
"""

import sys

from data_prep.cli import main

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if "--ray" not in arguments and not {"-h", "--help"} & set(arguments):
        arguments += ["--ray", "auto"]
    sys.exit(main(["shard", *arguments]))
