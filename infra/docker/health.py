"""Whether the Ray host of this container lives: `python health.py`; exit code 1 where it does not.

Asks its agent what Kubernetes asks it (`/api/healthz`, which needs no token).
"""

import argparse
import sys
import urllib.request


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=52365, help="of the agent (%(default)s)")
    parser.add_argument("--timeout", type=float, default=5.0, metavar="SECONDS", help="(%(default)s)")
    args = parser.parse_args()
    url = f"http://127.0.0.1:{args.port}/api/healthz"
    try:
        with urllib.request.urlopen(url, timeout=args.timeout) as answer:  # http, of this machine
            text = answer.read(1000).decode(errors="replace")
    except OSError as error:
        print(f"{url}: {error}")
        return 1
    print(text)
    return 0 if "success" in text else 1  # another server may answer at this port


if __name__ == "__main__":
    sys.exit(main())
