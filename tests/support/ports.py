"""Ports for servers of tests."""

from __future__ import annotations

import os

from infra.local.cluster import PORTS, free_ports

WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
OURS = PORTS[WORKER % 16 :: 16]  # no other process of this run of the tests looks among these


def free_port() -> int:
    """A TCP port of this machine that nothing listens on, also while a server is away."""
    return free_ports(1, OURS)[0]
