"""Ports for servers of tests."""

from __future__ import annotations

import os
import random
import socket

BELOW_EPHEMERAL = range(20_000, 30_000)  # the system gives none of these to a connection, also while a server is away
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
OURS = BELOW_EPHEMERAL[WORKER % 16 :: 16]  # no other process of this run of the tests looks among these


def free_port() -> int:
    """A TCP port of this machine that nothing listens on; at random, since other test runs look for one too."""
    while True:
        port = random.SystemRandom().choice(OURS)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))  # also where a server listens at another address
            except OSError:
                continue
            return port
