"""A bad cable: frames between a host and the bridge are held back, and some are lost.

`python -m infra.local.relay PID BRIDGE DEVICE ADDRESS MAC GATEWAY DELAY_S LOSS`: takes the place of eth0 in the network
of process PID until it is killed. (The kernel's own means for this, `tc netem`, is a module that machines may lack.)
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections import deque

from infra.local.network import plugged_in

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x2, 0x1000  # linux/if_tun.h
CLONE_NEWNET = 0x40000000  # linux/sched.h
MOST_FRAMES = 20_000  # that are held back in one direction; the rest are lost, as in any queue


def tap(name: str) -> int:
    """Make a network device whose frames this process sends and receives; returns its file descriptor."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TAP | IFF_NO_PI))
    return descriptor


def enter_network(pid: int) -> None:
    """Let this process go on in the network of another."""
    with open(f"/proc/{pid}/ns/net") as namespace:
        libc = ctypes.CDLL(None, use_errno=True)  # os.setns is of Python 3.12
        if libc.setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the network of process {pid}")


def relay(ends: tuple[int, int], delay_s: float, loss: float) -> None:
    """Carry frames between two devices for ever."""
    queues: dict[int, deque[tuple[float, bytes]]] = {end: deque() for end in ends}  # by where they go
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    while True:
        now = time.monotonic()
        due = [queue[0][0] - now for queue in queues.values() if queue]
        for end in select.select(ends, [], [], max(min(due), 0) if due else None)[0]:
            frame, queue = os.read(end, 65536), queues[other[end]]
            if random.random() >= loss and len(queue) < MOST_FRAMES:  # noqa: S311
                queue.append((time.monotonic() + delay_s, frame))
        now = time.monotonic()
        for end, queue in queues.items():
            while queue and queue[0][0] <= now:
                try:
                    os.write(end, queue.popleft()[1])
                except OSError:  # the device is down: the link is cut
                    continue


def main() -> int:
    pid, bridge, device, own, mac, gateway, delay_s, loss = sys.argv[1:]
    outside = tap(device)
    subprocess.run(["ip", "link", "set", device, "master", bridge, "up"], check=True)
    enter_network(int(pid))
    inside = tap("bad0")
    for words in (
        ["ip", "link", "set", "bad0", "address", mac],
        ["ip", "link", "set", "eth0", "down"],
        ["ip", "address", "flush", "dev", "eth0"],
        *plugged_in(own, gateway, "bad0"),
    ):
        subprocess.run(words, check=True)
    print("relaying", flush=True)
    relay((outside, inside), float(delay_s), float(loss))
    return 0


if __name__ == "__main__":
    sys.exit(main())
