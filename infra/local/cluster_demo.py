"""`make cluster-demo`: the whole service on a cluster of several hosts of this machine, one of which is killed.

Every step is a job that `ray job submit` sends from outside of the cluster, with an address, a token and a tracking URI.
Only what a bucket holds before a project begins is put there by hand: rendered videos, and 2D weights.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from infra.local import hosts, motions, network, services
from infra.local.record import Record, wait_until
from infra.local.secret_search import SecretSearch
from infra.local.trials import (
    BUCKET,
    MODEL,
    Disturbance,
    Trial,
    bucket,
    compare,
    ending,
    fill_bucket,
    losses,
    prepare,
    ranks_on,
)
from vswin_dist.config import load_settings
from vswin_dist.errors import WorkFailed, run_command

SETTINGS = (
    "training.epochs=4",
    "optim.warmup_epochs=1",
    "evaluation.every_epochs=4",
    "training.checkpoint_every=5",
    f"tracking.register_as={MODEL}",
    f"storage.root={BUCKET}/runs",
    f"data.train={BUCKET}/shards/train",
    f"data.val={BUCKET}/shards/val",
    f"model.init=models:/{MODEL}-inflated@champion",
)
ONE_VIEW = ("--clips", "1", "--crops", "1")
SERVICE_PORT, SERVICE_START_S = 8000, 240.0


@dataclass
class ClusterTrial(Trial):
    """The cluster, and what later steps are compared with."""

    alone: dict[int, float] = field(default_factory=dict)  # losses of the training on one host


def put_weights(trial: Trial) -> None:
    """Put 2D weights into the bucket, as if published."""
    from infra.local.stills import pretrain

    with trial.step("2D weights into the bucket") as found:
        settings = load_settings("demo", [f"data.train={bucket(trial) / 'shards/train'}"])
        with open(bucket(trial) / "raw/train/index.csv", newline="") as file:
            labels = {row["path"]: motions.SHAPES.index(row["shape"]) for row in csv.DictReader(file)}
        accuracy = pretrain(settings, labels, 2, bucket(trial) / "raw/swin_nano_2d.pth")
        found.append(f"{accuracy:.0f}% of still frames")


def inflate(trial: Trial) -> None:
    """Register a video model that starts from them."""
    with trial.step("inflate") as found:
        weights = ("--weights", f"{BUCKET}/raw/swin_nano_2d.pth", "--recipe", "demo")
        output = trial.submit("python", "jobs/inflate.py", *weights, "--register", f"{MODEL}-inflated")
        found.append(re.findall(r"registered (\S+)", output)[-1])


def train(trial: ClusterTrial) -> None:
    """Train on one host, and on two of which one is killed; the losses must be the same."""
    job = ("python", "jobs/train.py", "--recipe", "demo", *SETTINGS)
    with trial.step("train on one host") as found:
        alone = trial.submit(*job, "run.name=one-host", "training.workers=1")
        found.append(model_of(alone))
    trial.alone = losses(trial, alone)
    kill = Disturbance(trial.record, hosts.crash)
    with trial.step("train on two hosts") as found:
        together = trial.submit(*job, "run.name=two-hosts", "training.workers=2", meanwhile=kill)
        kill.check()
        resumed = re.findall(r"resumed from \S*step-0*(\d+)", together)
        found.append(f"{model_of(together)}, {kill.host} killed at step {kill.reached}, resumed from {resumed[-1]}")
        found.append(f"went on after {kill.stood_still_s:.0f} s")
    apart = compare(trial.alone, losses(trial, together))
    trial.rows.append(("losses of both", "", f"differ by {apart:.1e} at most"))


def share(trial: ClusterTrial) -> None:
    """Train twice at once, ask for more hosts than there are, and stop a training: none may disturb another.

    Raises:
        WorkFailed: one did.
    """
    record, job = trial.record, ("python", "jobs/train.py", "--recipe", "demo", *SETTINGS)
    with trial.step("two trainings at once") as found, ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(lambda n: trial.submit(*job, f"run.name={n}", "training.workers=1"), ("this", "that")))
        apart = max(compare(trial.alone, losses(trial, output)) for output in outputs)
        found.append(f"losses apart from those of one alone by {apart:.1e} at most")
    with trial.step("more workers than hosts") as found:
        began = time.monotonic()
        code, output = trial.attempt(*job, "run.name=too-many", "training.workers=16", "training.micro_batch=1")
        said = re.findall(r"^error: training\.workers=16 needs 16 CPUs, the Ray cluster has \S+", output, re.MULTILINE)
        if not (code and said):
            raise WorkFailed("a training on 16 ranks was not refused with the numbers")
        found.append(f"refused after {time.monotonic() - began:.0f} s")
    with trial.step("`ray job stop`") as found:
        with trial.running("stopped", *job, "run.name=stopped", "training.workers=2"):
            if not wait_until(lambda: ranks(record) == 2, 180):
                raise WorkFailed(f"two ranks should run: {ranks(record)} do")
            began = time.monotonic()
        if not wait_until(lambda: ranks(record) == 0, 60):
            raise WorkFailed(f"{ranks(record)} ranks are left of a training that was stopped")
        found.append(f"no rank left after {time.monotonic() - began:.0f} s")


def ranks(record: Record) -> int:
    """Return how many ranks of trainings run on all hosts."""
    return sum(ranks_on(record, host) for host in record.hosts.values())


def model_of(output: str) -> str:
    """Return the model that a training registered."""
    return str(re.findall(r"^model +(\S+)", output, re.MULTILINE)[-1])


def evaluate(trial: Trial) -> None:
    """Score the new model on two hosts."""
    with trial.step("evaluate") as found:
        what = ("--model", f"models:/{MODEL}@candidate", "--data", f"{BUCKET}/shards/val", *ONE_VIEW)
        where = ("--batch", "32", "--ranks", "2", "--storage-root", f"{BUCKET}/scores")
        output = trial.submit("python", "jobs/evaluate.py", *what, *where)
        found.append(f"top-1 {re.findall(r'top-?1[^0-9]*([0-9.]+)', output)[0]}%")


def promote(trial: Trial) -> None:
    """Make it champion, as good as the other is enough."""
    with trial.step("promote") as found:
        what = ("--data", f"{BUCKET}/shards/val", "--margin=-1", *ONE_VIEW, "--batch", "32")
        output = trial.submit("python", "jobs/promote.py", MODEL, *what, "--storage-root", f"{BUCKET}/scores")
        found += re.findall(r"^\S+ (?:is the champion now|stays the champion).*", output, re.MULTILINE)


def predict(trial: Trial) -> None:
    """Ask the champion for the class of a video."""
    with trial.step("predict") as found:
        video = next(iter(sorted((bucket(trial) / "raw/val/left").glob("*.mp4"))))
        url = f"{BUCKET}/raw/val/left/{video.name}"
        output = trial.submit("python", "jobs/predict.py", "--model", f"models:/{MODEL}@champion", *ONE_VIEW, url)
        found.append(f"left: {' '.join(re.findall(r'([0-9.]+%) +(.+)', output)[0])}")


def serve(trial: Trial) -> None:
    """Serve the champion on the cluster, and ask it over HTTP for the class of a video.

    Raises:
        WorkFailed: it does not come up, or does not answer.
    """
    with trial.step("serve") as found:
        place = trial.record.head.address
        url, video = f"http://{place}:{SERVICE_PORT}", next(iter(sorted((bucket(trial) / "raw/val/left").glob("*.mp4"))))
        job = ("python", "-m", "vswin_dist.serving", f"models:/{MODEL}@champion", *ONE_VIEW)
        began = time.monotonic()
        with trial.running("serving", *job, "--host", place, "--port", str(SERVICE_PORT)):
            if not wait_until(lambda: services.ask(f"{url}/health")[0] == 200, SERVICE_START_S):
                raise WorkFailed(f"the service does not answer at {url}: {services.ask(f'{url}/health')}")
            found.append(f"answers after {time.monotonic() - began:.0f} s")
            code, answer = services.ask(f"{url}/predict", body=video.read_bytes())
            if code != 200:
                raise WorkFailed(f"the service answered HTTP {code}: {answer.decode(errors='replace')}")
            best = json.loads(answer)["classes"][0]
            found.append(f"left: {best['probability']:.1%} {best['name']}")
        if not wait_until(lambda: services.ask(f"{url}/health")[0] == 0, 60):
            raise WorkFailed(f"the service still answers at {url} after its job was stopped")


def search_for_secrets(trial: Trial) -> None:
    """Look for every secret in all that the cluster has written, said or been called with.

    Raises:
        WorkFailed: one stands somewhere; names the place.
    """
    with trial.step("search for secrets") as found:
        record, search = trial.record, SecretSearch.of(trial.record)
        kept = ("secrets/", hosts.client_file(record).name, "token")  # in mode 600
        search.below(record.folder, *kept)
        for host in record.hosts.values():
            if record.number is not None and record.runs(host.name):
                search.below(hosts.disk(record, host), *kept, enter=network.entered(record, host))
        url = hosts.client_environment(record)["RAY_API_SERVER_ADDRESS"] + "/api/jobs/"
        search.text("the list of jobs", services.ask(url, token=services.all_secrets(record)["ray_token"])[1].decode())
        search.command_lines()
        found.append(search.check())


STEPS: tuple[Callable[[ClusterTrial], None], ...] = (
    fill_bucket,
    prepare,
    put_weights,
    inflate,
    train,
    share,
    evaluate,
    promote,
    predict,
    serve,
    search_for_secrets,
)


def run(folder: Path, nodes: int) -> int:
    """Start a cluster, take the steps, end the cluster, and print the table."""
    began = time.monotonic()
    record = hosts.up(folder, nodes, 1)
    trial = ClusterTrial(record)
    trial.rows.append(("start the cluster", f"{time.monotonic() - began:.0f}", f"{len(record.hosts)} hosts and 3 services"))
    with ending(trial, began):
        try:
            for step in STEPS:
                step(trial)
        except BaseException:
            print(hosts.status(record), file=sys.stderr, flush=True)
            raise
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(f"{hosts.FOLDER}-demo"), help="of its cluster (%(default)s)")
    parser.add_argument("--nodes", type=int, default=3, metavar="N", help="workers, three or more (%(default)s)")
    args = parser.parse_args()
    if args.nodes < 3:
        parser.error(f"--nodes={args.nodes}: two train and one takes the place of the one that is killed")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, hosts.stop)
    return run(args.folder.absolute(), args.nodes)


if __name__ == "__main__":
    sys.exit(run_command(main))
