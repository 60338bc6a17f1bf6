"""Speed and memory, with peers in the same run: ``python jobs/benchmark.py model|prep|loader ...`` (each has --help)."""

import sys

from vswin_dist.errors import ConfigError, run_command


def main() -> int:
    what, arguments = (sys.argv[1] if len(sys.argv) > 1 else "", sys.argv[2:])
    if what == "model":
        from vswin_dist.models import bench

        return bench.main(arguments) or 0
    if what == "prep":
        from data_prep import bench as prep_bench

        return prep_bench.main(arguments) or 0
    if what == "loader":
        from vswin_dist.data import bench as loader_bench

        return loader_bench.main(arguments) or 0
    raise ConfigError(f"benchmark {what!r}: say model, prep or loader")


if __name__ == "__main__":
    sys.exit(run_command(main))
