"""A bad network cable: packets between two TUN devices, late and with losses, in user space.

    python -m tests.tun_relay SECONDS SHARE NAMESPACE/DEVICE NAMESPACE/DEVICE

For machines whose kernel has no netem. Each packet arrives SECONDS after it was sent, in order, or
(SHARE of them, by a seeded generator) not at all. Both devices exist and are up; ends with SIGTERM.
"""

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
    """Carries packets for ever; `ends` are the two files."""
    other, draw = dict(zip(ends, reversed(ends), strict=True)), random.Random(0)
    under_way = deque()
    while True:
        wait = max(under_way[0][0] - time.monotonic(), 0) if under_way else None
        readable, _, _ = select.select(ends, [], [], wait)
        for end in readable:
            packet = os.read(end, LARGEST)
            if draw.random() >= loss:
                under_way.append((time.monotonic() + delay, other[end], packet))
        while under_way and under_way[0][0] <= time.monotonic():
            _, end, packet = under_way.popleft()
            try:
                os.write(end, packet)
            except OSError:  # the device is down: what arrives there is lost, as on a cable
                continue


if __name__ == "__main__":
    relay(float(sys.argv[1]), float(sys.argv[2]), [attach(place) for place in sys.argv[3:]])
