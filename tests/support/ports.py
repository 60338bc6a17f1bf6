"""Ports for servers of tests."""

from __future__ import annotations

import random
import socket

BELOW_EPHEMERAL = range(20_000, 30_000)  # the system gives none of these to a connection, also while a server is away


def free_port() -> int:
    """A TCP port of this machine that nothing listens on; at random, since other test runs look for one too."""
    while True:
        port = random.SystemRandom().choice(BELOW_EPHEMERAL)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
