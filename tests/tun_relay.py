"""A bad network cable: packets between two TUN devices, late and with losses, in user space.

    python -m tests.tun_relay SECONDS SHARE NAMESPACE/DEVICE NAMESPACE/DEVICE

For machines whose kernel has no netem. As with `tc qdisc add dev DEVICE root netem delay … loss …`
on the first of them, what that one sends arrives SECONDS later, in order, or (SHARE of the packets,
by a seeded generator) not at all. Both devices exist and are up; ends with SIGTERM.
"""

import contextlib
import ctypes
import fcntl
import os
import pathlib
import random
import select
import struct
import sys
import time
from collections import deque

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
CLONE_NEWNET = 0x40000000
NAMESPACES = pathlib.Path("/var/run/netns")
LARGEST = 1 << 16


def attach(place):
    """The file that reads what a namespace's TUN device sends and writes what it receives."""
    namespace, device = place.split("/")
    libc = ctypes.CDLL(None, use_errno=True)
    with (NAMESPACES / namespace).open() as inside:
        if libc.setns(inside.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {namespace}")
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", device.encode(), IFF_TUN | IFF_NO_PI))
    return tun


def relay(delay, loss, ends):
    """Carries packets for ever; `ends` are the two files, the first of which sends badly."""
    bad, draw = ends[0], random.Random(0)
    late = deque()
    while True:
        wait = max(late[0][0] - time.monotonic(), 0) if late else None
        readable, _, _ = select.select(ends, [], [], wait)
        for end in readable:
            packet = os.read(end, LARGEST)
            if end != bad:
                deliver(bad, packet)
            elif draw.random() >= loss:
                late.append((time.monotonic() + delay, packet))
        while late and late[0][0] <= time.monotonic():
            deliver(ends[1], late.popleft()[1])


def deliver(end, packet):
    """Hands a packet to a device; one that is down loses it, as a cable does."""
    with contextlib.suppress(OSError):
        os.write(end, packet)


if __name__ == "__main__":
    relay(float(sys.argv[1]), float(sys.argv[2]), [attach(place) for place in sys.argv[3:]])
