"""Serve a model over HTTP, with a page to drop a video on: `python -m vswin_dist.serving models:/NAME@champion`."""

from __future__ import annotations

import argparse
import importlib.util
import socket
import sys

from vswin_dist.errors import ConfigError, PreflightError, at_least, before_start, run_command


def main() -> int:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(prog="python -m vswin_dist.serving", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="models:/NAME@alias, models:/NAME/3, or a checkpoint's folder or URL")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen; 0.0.0.0 is everywhere, without any login")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--replicas", type=int, default=1, help="processes with the model")
    parser.add_argument("--cpus", type=int, default=1, help="of each replica")
    parser.add_argument("--gpu", action="store_true", help="one GPU for each replica")
    parser.add_argument("--clips", type=int, default=1, help="views in time")
    parser.add_argument("--crops", type=int, default=1, help="views in space")
    parser.add_argument("--batch", type=int, default=8, help="videos in one forward pass, of as many requests")
    parser.add_argument("--wait-ms", type=int, default=10, help="for others to share a forward pass")
    parser.add_argument("--max-mb", type=int, default=64, help="of a request")
    parser.add_argument("--max-seconds", type=int, default=30, help="for a request to arrive, be decoded and be answered")
    parser.add_argument("--max-videos", type=int, default=16, help="of a request for several")
    parser.add_argument("--tracking-uri", default=None)
    parser.add_argument("--s3-endpoint", default=None)
    args = parser.parse_args()
    counts = ("replicas", "cpus", "clips", "crops", "batch", "max_mb", "max_seconds", "max_videos")
    at_least(1, **{name.replace("_", "-"): getattr(args, name) for name in counts})
    at_least(0, **{"wait-ms": args.wait_ms})
    if importlib.util.find_spec("fastapi") is None:
        raise PreflightError("serving needs Ray Serve: pip install 'vswin_dist[serve]'")

    check_port(args.host, args.port)

    from vswin_dist.serving.predict import find_model
    from vswin_dist.storage import use_s3_endpoint

    use_s3_endpoint(args.s3_endpoint)
    with before_start():
        model, uri = find_model(args.model, args.tracking_uri)

    from vswin_dist.serving.ray_serve import Offer, serve_until_stopped
    from vswin_dist.serving.service import ServiceLimits

    limits = ServiceLimits(megabytes=args.max_mb, videos=args.max_videos, seconds=args.max_seconds)
    offer = Offer(
        model=model,
        tracking_uri=uri,
        clips=args.clips,
        crops=args.crops,
        batch=args.batch,
        wait_s=args.wait_ms / 1000,
        use_gpu=args.gpu,
        s3_endpoint=args.s3_endpoint,
        limits=limits,
    )
    serve_until_stopped(offer, args.host, args.port, args.replicas, args.cpus)
    return 0


def check_port(host: str, port: int) -> None:
    """Refuse an address at which nothing can be served.

    Raises:
        ConfigError: there is no such port. PreflightError: it is taken, or the host is not this machine.
    """
    if not 0 < port < 1 << 16:
        raise ConfigError(f"--port={port}: must be 1 to 65535")
    with socket.socket() as mine:
        mine.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            mine.bind((host, port))
        except OSError as error:
            raise PreflightError(
                f"cannot serve at {host}:{port}: {error.strerror}. Give another --port or --host"
            ) from error


if __name__ == "__main__":
    sys.exit(run_command(main))
