"""Tracking from the command line: `python -m vswin_dist.tracking sync ROOT`."""

import argparse
import sys

from vswin_dist import storage
from vswin_dist.errors import run_command


def main() -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m vswin_dist.tracking", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    text = "send to MLflow what it has not got of trainings during which it was away"
    sync_parser = commands.add_parser("sync", help=text, description=text)
    sync_parser.add_argument("root", metavar="ROOT", help="a data root, a folder of runs or a run's; a path or a URL")
    sync_parser.add_argument("--tracking-uri", help="the store, where it is another than the trainings knew")
    sync_parser.add_argument("--s3-endpoint", help="another than AWS, or AWS_ENDPOINT_URL_S3")
    args = parser.parse_args()
    storage.use_s3_endpoint(args.s3_endpoint)
    from vswin_dist.tracking.sync import sync

    return 0 if sync(args.root, args.tracking_uri) else 1


if __name__ == "__main__":
    sys.exit(run_command(main))
