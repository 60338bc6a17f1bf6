"""Requests per second and latencies of a served model, beside those of `mlflow models serve`, and what broken videos do.

`python jobs/benchmark.py serving VIDEO ...`: the two run one after the other on this machine, each with one process that
computes; the clients are threads of this one. A request brings one of the videos, and a client sends its next when it has
its answer. Seconds of the processor are those of a server and of all that it has started: they tell of a machine with
other work, too.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from vswin_dist.config.schema import DataSettings
from vswin_dist.errors import WorkFailed, at_least
from vswin_dist.model_card import preprocessing_of
from vswin_dist.models import build_model
from vswin_dist.models.weights.portable import write_model
from vswin_dist.serving import PYFUNC_CODE
from vswin_dist.tracking import Registry

START_S = 300.0
BROKEN = 20  # of so many requests, one brings a broken video
REPLICA = "ServeReplica"  # in the name of a process of Ray Serve that computes
MB = 1e6


@dataclass(frozen=True)
class Server:
    """A program that serves the model at a port, and how it is asked."""

    name: str
    command: list[str]
    health: str
    path: str
    as_json: bool  # base64 in MLflow's JSON, not the bytes alone

    def body(self, video: bytes) -> bytes:
        """Make the body of a request for `video`."""
        if not self.as_json:
            return video
        url = f"data:video/mp4;base64,{base64.b64encode(video).decode()}"
        return json.dumps({"dataframe_records": [{"video": url}]}).encode()


@dataclass(frozen=True)
class Answers:
    """Seconds to each answer, the statuses, and the seconds in all."""

    latencies: list[float]
    statuses: Counter[int]
    seconds: float

    def __str__(self) -> str:
        cuts = statistics.quantiles(self.latencies, n=20) if len(self.latencies) > 1 else self.latencies * 19
        return f"{len(self.latencies) / self.seconds:7.2f} requests/s, p50 {cuts[9]:.3f} s, p95 {cuts[18]:.3f} s"


@contextlib.contextmanager
def running(server: Server, port: int, log: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Start `server` and wait until it answers; end it, with all that it started, when the block is left.

    Raises:
        WorkFailed: it does not come up; the message holds the end of its log.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(server.command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        end = time.monotonic() + START_S
        while not _answers(server, port):
            if process.poll() is not None or time.monotonic() > end:
                raise WorkFailed(f"{server.name} did not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.5)
        yield process
    finally:
        started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        for left in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        process.kill()
        process.wait()


def _answers(server: Server, port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
        connection.request("GET", server.health)
        return connection.getresponse().status == 200
    return False


def computed(service: subprocess.Popen[bytes]) -> float:
    """Sum the processor's seconds of a server and of all that it has started, so far."""
    total, mine = 0.0, psutil.Process(service.pid)
    for process in (mine, *mine.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def ask(server: Server, port: int, bodies: Iterator[bytes], clients: int, most: int, seconds: float) -> Answers:
    """Ask by `clients` at once until `most` requests are sent, or `seconds` are over."""
    lock, latencies, statuses = threading.Lock(), list[float](), Counter[int]()
    began = time.monotonic()
    left = itertools.count(most, -1)

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        while time.monotonic() - began < seconds:
            with lock:
                if next(left) <= 0:
                    break
                body = next(bodies)
            sent = time.monotonic()
            connection.request("POST", server.path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            with lock:
                latencies.append(time.monotonic() - sent)
                statuses[answer.status] += 1
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Answers(latencies, statuses, time.monotonic() - began)


def with_broken(videos: Sequence[bytes]) -> Iterator[bytes]:
    """Give `videos` over and over; every twentieth time another kind of damage: cut short, noise within, no video, blank."""
    broken = itertools.cycle([lambda v: v[: len(v) // 3], lambda v: v[:200] + bytes(len(v) - 200), lambda _: b"no video"])
    for number, video in enumerate(itertools.cycle(videos), start=1):
        yield next(broken)(video) if number % BROKEN == 0 else video


def replicas(service: subprocess.Popen[bytes]) -> dict[int, float]:
    """Find the processes of Ray Serve that compute: id -> MB of memory that nobody shares with them."""
    found = {}
    for process in psutil.Process(service.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if REPLICA in " ".join(process.cmdline()):
                found[process.pid] = process.memory_full_info().uss / MB
    return found


def endure(server: Server, port: int, service: subprocess.Popen[bytes], videos: Sequence[bytes], requests: int) -> None:
    """Send `requests` of which one in twenty is broken, in ten parts, and print what became of them, and of memory."""
    bodies, statuses, seconds, held = with_broken(videos), Counter[int](), 0.0, list[float]()
    before = replicas(service)
    for _ in range(10):
        found = ask(server, port, bodies, 16, requests // 10, float("inf"))
        statuses += found.statuses
        seconds += found.seconds
        held.append(sum(replicas(service).values()))
    lost = before.keys() - replicas(service).keys()
    print(
        f"{sum(statuses.values())} requests, 1 in {BROKEN} broken, in {seconds:.0f} s: statuses "
        f"{', '.join(f'{status} {count} times' for status, count in sorted(statuses.items()))}; "
        f"{len(lost)} of {len(before)} processes lost; MB after each tenth: {', '.join(f'{mb:.0f}' for mb in held)}",
        flush=True,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="benchmark.py serving", description=__doc__)
    parser.add_argument("videos", nargs="+", metavar="VIDEO", help="files")
    parser.add_argument("--model", default="swin_nano", help="preset; random weights")
    parser.add_argument("--frames", type=int, default=16, help="of a clip")
    parser.add_argument("--size", type=int, default=32, help="pixels")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16], help="that ask at once, one after the other")
    parser.add_argument("--seconds", type=int, default=20, help="for each number of clients")
    parser.add_argument("--requests", type=int, default=1000, help="in the end, with broken videos among them; 0: none")
    args = parser.parse_args(argv)
    at_least(1, frames=args.frames, size=args.size, seconds=args.seconds, clients=min(args.clients))
    at_least(0, requests=args.requests)
    videos = [Path(video).read_bytes() for video in args.videos]
    data = DataSettings(
        train="", sampling="dense", frames=args.frames, stride=2, size=args.size, short_side=args.size * 8 // 7
    )
    with tempfile.TemporaryDirectory(prefix="vs-", dir=os.environ.get("RAY_TMPDIR", "/tmp")) as place:  # noqa: S108
        classes = [f"class {i}" for i in range(400)]
        model = build_model(args.model, num_classes=len(classes))
        folder = write_model(f"{place}/model", model, classes=classes, preprocessing=preprocessing_of(data), lineage={})
        uri = f"sqlite:///{place}/mlflow.db"
        Registry(uri).register("served", folder, tags={}, pyfunc=PYFUNC_CODE)
        print(f"{args.model}, {args.frames} x {args.size} x {args.size}, 1 view, {len(videos)} videos", flush=True)
        environment = {**os.environ, "RAY_TMPDIR": place, "MLFLOW_TRACKING_URI": uri, "OMP_NUM_THREADS": "1"}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        for make in (mlflow_server, ray_server):
            port = _free_port()
            server = make(folder, port)
            with running(server, port, Path(place, f"{server.name.split()[0]}.log"), environment) as process:
                for clients in args.clients:
                    bodies = map(server.body, itertools.cycle(videos))
                    ask(server, port, bodies, clients, 2 * clients, args.seconds)  # warms up
                    began = computed(process)
                    found = ask(server, port, bodies, clients, sys.maxsize, args.seconds)
                    each = (computed(process) - began) / len(found.latencies)
                    print(f"{server.name:20} {clients:3} clients: {found}, {each:.3f} s of the processor each", flush=True)
                if args.requests and not server.as_json:
                    endure(server, port, process, videos, args.requests)
    return 0


def mlflow_server(folder: str, port: int) -> Server:
    """Return MLflow's own server of the model, registered as `served`."""
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "models",
        "serve",
        "--model-uri",
        "models:/served/1",
        "--env-manager",
        "local",
    ]
    return Server("mlflow models serve", [*command, "--port", str(port)], "/ping", "/invocations", True)


def ray_server(folder: str, port: int) -> Server:
    """Return this project's service of the model in `folder`."""
    command = [sys.executable, "-m", "vswin_dist.serving", folder, "--port", str(port)]
    return Server("vswin_dist.serving", command, "/health", "/predict", False)


def _free_port() -> int:
    with socket.socket() as mine:
        mine.bind(("127.0.0.1", 0))
        return int(mine.getsockname()[1])
