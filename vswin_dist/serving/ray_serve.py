"""The service on Ray Serve: replicas of a model, each of which takes what many requests bring in one forward pass.

The only module that imports Ray Serve.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from dataclasses import dataclass

import torch
from fastapi import FastAPI
from torch import Tensor

from vswin_dist import cluster, storage
from vswin_dist.cluster import Resources
from vswin_dist.errors import PreflightError, WorkFailed
from vswin_dist.serving.predict import load_predictor
from vswin_dist.serving.service import Engine, ServiceLimits, build_app

from ray import serve  # isort: skip # after `cluster`, which gives Ray a home folder

APPLICATION = "vswin"
WAITING = 256  # requests, before others are answered with 503


@dataclass(frozen=True)
class Offer:
    """What each replica serves, as plain values that Ray can ship."""

    model: str  # models:/NAME/VERSION, or a folder or URL
    tracking_uri: str
    clips: int
    crops: int
    batch: int  # videos in one forward pass
    wait_s: float  # for others to share it
    use_gpu: bool
    s3_endpoint: str | None
    limits: ServiceLimits


@serve.ingress()
class Replica:
    """A model in a process of its own."""

    def __init__(self, offer: Offer) -> None:
        storage.use_s3_endpoint(offer.s3_endpoint)
        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
        self.predictor = load_predictor(
            offer.model,
            uri=offer.tracking_uri,
            clips=offer.clips,
            crops=offer.crops,
            batch=offer.batch * offer.clips * offer.crops,
            device="cuda" if offer.use_gpu else "cpu",
            limits=offer.limits.of_a_video,
        )
        self.score.set_max_batch_size(offer.batch)
        self.score.set_batch_wait_timeout_s(offer.wait_s)
        self.engine = Engine(offer.model, self.predictor, offer.limits, self.score)

    @serve.batch()
    async def score(self, views: list[Tensor]) -> list[Tensor]:
        """Score what several requests have brought, beside the event loop, which goes on answering."""
        return list(await asyncio.to_thread(self.predictor.scores, views))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Give Ray the application; see `serve.ingress`."""
        return build_app(self.engine)


def serve_until_stopped(offer: Offer, host: str, port: int, replicas: int, cpus: float) -> None:
    """Serve on the cluster of `RAY_ADDRESS`, or on one of this machine's own, until SIGINT or SIGTERM.

    Args:
        cpus: of each replica.

    Raises:
        PreflightError: the cluster is too small, or Ray Serve runs there.
        WorkFailed: a replica cannot load the model.
    """
    with cluster.joined(), contextlib.suppress(KeyboardInterrupt):
        cluster.check_resources(Resources((replicas,), offer.use_gpu, cpus, 0), "--replicas")
        check_alone()
        deployment = serve.deployment(
            Replica,
            name="model",
            num_replicas=replicas,
            max_ongoing_requests=4 * offer.batch,
            max_queued_requests=WAITING,
            ray_actor_options={"num_cpus": cpus, "num_gpus": int(offer.use_gpu)},
            logging_config={"enable_access_log": False},
        )
        try:
            serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port})
            serve.run(deployment.bind(offer), name=APPLICATION)
            print(f"serving {offer.model} at http://{host}:{port}", flush=True)
            while True:
                time.sleep(3600)
        except RuntimeError as error:
            raise WorkFailed(f"{offer.model} is not served: {error}") from error
        finally:
            serve.shutdown()


def check_alone() -> None:
    """Refuse a cluster on which Ray Serve runs: it has one HTTP address for all, and ends with whoever ends it.

    Raises:
        PreflightError: names what runs there.
    """
    there = serve.status()
    if there.applications or there.proxies:
        running = [f"{name} ({application.status.value})" for name, application in there.applications.items()]
        raise PreflightError(
            f"Ray Serve runs on this cluster already: {', '.join(running) or 'without an application'}. End the service "
            "that started it (or Ray Serve, by `serve shutdown`), or name another cluster by RAY_ADDRESS; without it, Ray "
            "starts on this machine"
        )
