"""`make tracking-demo`: two trainings as people follow them in MLflow, from the first score to the answer over HTTP.

MLflow runs here on PostgreSQL and S3, with accounts, as on a cluster. The jobs run here too, each with no more than the
environment of a user of those services, and with a user's rights.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from infra.local import hosts, services
from infra.local.cluster import free_ports, run_shown
from infra.local.cluster_demo import inflate, model_of, put_weights
from infra.local.record import Record, marked, read
from infra.local.secret_search import SecretSearch
from infra.local.trials import BUCKET, MODEL, REPOSITORY, Trial, bucket, fill_bucket, prepare
from vswin_dist.errors import WorkFailed, run_command
from vswin_dist.tracking.provenance import source_version

FOLDER = Path("/var/tmp/vswin-tracking")  # noqa: S108 # open to PostgreSQL's user
SERVICE = "serving"
SERVICE_START_S = 240.0
AWAY_S = 30.0
DATA = ("--data", f"{BUCKET}/shards/val", "--storage-root", f"{BUCKET}/scores", "--batch", "48")
SETTINGS = (
    "training.workers=2",
    "training.checkpoint_every=15",
    "evaluation.every_epochs=2",
    f"tracking.register_as={MODEL}",
    f"storage.root={BUCKET}/runs",
    f"data.train={BUCKET}/shards/train",
    f"data.val={BUCKET}/shards/val",
    f"model.init=models:/{MODEL}-inflated@champion",
)
DIFFERENT = {
    "short": ("training.epochs=2", "optim.warmup_epochs=1"),
    "long": ("training.epochs=8", "optim.warmup_epochs=2", "optim.lr=0.002"),
}


def user_environment(record: Record) -> dict[str, str]:
    """Return the environment of a user: keys of the bucket and an account of MLflow, and a home of one's own."""
    own, made = record.folder / "user", services.all_secrets(record)
    own.mkdir(exist_ok=True)
    return {
        **services.base_environment(record),
        **services.s3_environment(record, made),
        **services.account(record, made),
        "HOME": str(own),
        "VSWIN_HOME": f"{own}/vswin",
        "VSWIN_CACHE": f"{own}/cache",
        "VSWIN_SOURCE_COMMIT": source_version(REPOSITORY),
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONUNBUFFERED": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "RAY_TMPDIR": str(record.folder / "ray"),
        "RAY_USAGE_STATS_ENABLED": "0",
    }


@dataclass
class Desk(Trial):
    """A user's machine: jobs run on it, and not on the hosts of a cluster."""

    def submit(self, *job: str, meanwhile: Callable[[str], None] = lambda line: None) -> str:
        """Run a job here to its end, its output shown and returned; raises as `Trial.submit` does."""
        code, output = self.run(job, user_environment(self.record), meanwhile)
        if code:
            raise WorkFailed(f"the job {shlex.join(job)} failed: its output stands above")
        return output

    def run(
        self, job: tuple[str, ...], env: dict[str, str], meanwhile: Callable[[str], None] = lambda line: None
    ) -> tuple[int, str]:
        """Run a job with the environment of somebody, its output shown; returns its exit code and its output."""
        print(f"$ {shlex.join(job)}", flush=True)
        return run_shown(job, REPOSITORY, env, meanwhile)


def make_shards(desk: Trial) -> None:
    """Make the shards of both sets, as on any machine."""
    prepare(desk, ("data-prep", "shard"))


def train(desk: Trial) -> None:
    """Train twice with different settings."""
    for name, settings in DIFFERENT.items():
        with desk.step(f"train: {name}") as found:
            job = ("python", "jobs/train.py", "--recipe", "demo", f"run.name={name}", *SETTINGS, *settings)
            found.append(model_of(desk.submit(*job)))


def evaluate(desk: Trial) -> None:
    """Score both models, each with 4 x 3 views; and the better one with frames in random order."""
    for number, control in ((1, ()), (2, ()), (2, ("--shuffle-frames",))):
        with desk.step(f"evaluate version {number}{', frames in random order' * bool(control)}") as found:
            what = ("--model", f"models:/{MODEL}/{number}", "--clips", "4", "--crops", "3", *control)
            output = desk.submit("python", "jobs/evaluate.py", *what, *DATA)
            found.append(f"top-1 {re.findall(r'top-?1[^0-9]*([0-9.]+)', output)[0]}%")


def compare(desk: Trial) -> None:
    """Compare them, by what is scored."""
    with desk.step("compare") as found:
        both = (f"models:/{MODEL}/1", f"models:/{MODEL}/2", "--clips", "4", "--crops", "3")
        output = desk.submit("python", "jobs/compare.py", *both, *DATA)
        found += [" ".join(line.split()) for line in output.splitlines() if line.startswith("top-1 ")]


def promote(desk: Trial) -> None:
    """Let the better one be the champion, by the evaluations that MLflow has."""
    with desk.step("promote") as found:
        output = desk.submit("python", "jobs/promote.py", MODEL)
        found += re.findall(r"^\S+ (?:is the champion now|stays the champion).*", output, re.MULTILINE)


def serve(desk: Trial) -> None:
    """Start the service of the champion, and ask it for the class of a video."""
    [port] = free_ports(1)
    url, video = f"http://127.0.0.1:{port}", next(iter(sorted((bucket(desk) / "raw/val/left").glob("*.mp4"))))
    with desk.step("serve") as found:
        command = [sys.executable, "-m", "vswin_dist.serving", f"models:/{MODEL}@champion", "--port", str(port)]
        print(f"$ {shlex.join(command[1:])}", flush=True)
        desk.record.launch(SERVICE, command, user_environment(desk.record))
        desk.record.services[SERVICE] = url
        desk.record.save()
        desk.record.wait_for(SERVICE, lambda: services.ask(f"{url}/health")[0] == 200, SERVICE_START_S)
        code, answer = services.ask(f"{url}/predict", body=video.read_bytes())
        if code != 200:
            raise WorkFailed(f"the service answered HTTP {code}: {answer.decode(errors='replace')}")
        best = json.loads(answer)["classes"][0]
        found.append(f"left: {best['name']} {best['probability']:.1%}")


def be_away(desk: Trial) -> None:
    """Take MLflow away while an evaluation scores: the service answers meanwhile, and the evaluation is logged later.

    Raises:
        WorkFailed: the service does not answer.
    """
    record, url = desk.record, desk.record.services[SERVICE]
    back = threading.Timer(AWAY_S, lambda: services.start_mlflow(record, services.all_secrets(record)))

    def take_away(line: str) -> None:
        if line.startswith("scoring ") and record.runs("mlflow"):
            record.end("mlflow", signal.SIGTERM)
            back.start()
            if services.ask(f"{url}/health")[0] != 200:
                raise WorkFailed("the service does not answer while MLflow is away")

    with desk.step(f"MLflow is away for {AWAY_S:g} s") as found:
        what = ("--model", f"models:/{MODEL}/1", "--clips", "1", "--crops", "1", *DATA)
        desk.submit("python", "jobs/evaluate.py", *what, meanwhile=take_away)
        back.join()
        found.append("the service answered, the evaluation was logged")


def export(desk: Trial) -> None:
    """Keep the champion beside itself in two other forms."""
    for form in ("onnx", "huggingface"):
        with desk.step(f"export to {form}") as found:
            job = ("python", "jobs/export.py", f"models:/{MODEL}@champion", "--to", form, "--register")
            found += re.findall(r"largest difference \S+(?=,)", desk.submit(*job))[-1:]


def refuse_a_stranger(desk: Trial) -> None:
    """See that another account of MLflow, which may read all of it, changes nothing, and is told so before any work.

    Raises:
        WorkFailed: it is not refused as bad input is.
    """
    with desk.step("another account") as found:
        name, password = "stranger", secrets.token_urlsafe(18)
        services.add_account(desk.record, name, password)
        env = user_environment(desk.record) | {"MLFLOW_TRACKING_USERNAME": name, "MLFLOW_TRACKING_PASSWORD": password}
        job = ("python", "jobs/evaluate.py", "--model", f"models:/{MODEL}@champion", *DATA)
        assert isinstance(desk, Desk)
        code, _ = desk.run(job, env)
        if code != 2:
            raise WorkFailed(f"another account was not refused before the scoring: exit code {code}")
        found.append("may not log evaluations: refused before the scoring")


def search_for_secrets(desk: Trial) -> None:
    """Look for every secret in what was written: objects, logs, the user's files.

    Raises:
        WorkFailed: one stands somewhere; names the place.
    """
    with desk.step("search for secrets") as found:
        search = SecretSearch.of(desk.record)
        search.below(desk.record.folder, "secrets/", "postgres/")
        found.append(search.check())


STEPS: tuple[Callable[[Trial], None], ...] = (
    fill_bucket,
    make_shards,
    put_weights,
    inflate,
    train,
    evaluate,
    compare,
    promote,
    serve,
    be_away,
    export,
    refuse_a_stranger,
    search_for_secrets,
)


def run(folder: Path, keep: bool) -> int:
    """Start the services, take the steps, print the table, and end all of it unless it is to be kept."""
    began = time.monotonic()
    services.check()
    record = hosts.make(folder, plain=True)
    desk = Desk(record)
    try:
        services.start(record)
        services.wait(record)
        (folder / "ray").mkdir()
        desk.rows.append(("start the services", f"{time.monotonic() - began:.0f}", ", ".join(record.services)))
        for step in STEPS:
            step(desk)
        desk.rows.append(("in all", f"{time.monotonic() - began:.0f}", ""))
        print(f"\n{hosts.table(desk.rows)}", flush=True)
    except BaseException:
        keep = False
        raise
    finally:
        if not keep:
            end(record)
    if keep:
        show(record)
    elif left := list(marked(folder)):
        raise WorkFailed(f"these processes are left: {left}")
    return 0


def end(record: Record) -> None:
    """End the service and all that it stands on, and remove the folder."""
    record.end(SERVICE, signal.SIGTERM)
    hosts.down(record.folder)


def show(record: Record) -> None:
    """Say where to look, and how to end it."""
    file = record.folder / "secrets" / services.SECRETS
    print(f"\nMLflow     {record.services['mlflow']} (the account stands in {file}; choose Model training at the top left)")
    print(f"service    {record.services[SERVICE]}")
    print(
        f"end it by  python -m {__spec__.name if __spec__ else 'infra.local.tracking_demo'} --end --folder {record.folder}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of all that it holds (%(default)s)")
    parser.add_argument("--keep", action="store_true", help="leave MLflow and the service running, to look at")
    parser.add_argument("--end", action="store_true", help="end what was kept")
    args = parser.parse_args()
    folder = Path(os.path.abspath(args.folder))
    if args.end:
        end(read(folder))
        return 0
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, hosts.stop)
    return run(folder, args.keep)


if __name__ == "__main__":
    sys.exit(run_command(main))
