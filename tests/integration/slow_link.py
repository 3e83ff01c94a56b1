"""Carries frames between two interfaces, late and with losses: `slow_link.py ONE OTHER DELAY_S LOSS`.

For kernels without netem. Frames keep the header in which the kernel notes what it has left to the hardware
(PACKET_VNET_HDR): checksums, and the segments of a large packet.
"""

import random
import select
import socket
import sys
import time
from collections import deque

# Of linux/if_packet.h; Python's socket module has none of them.
_SOL_PACKET, _PACKET_VNET_HDR, _PACKET_OUTGOING, _ETH_P_ALL = 263, 15, 4, 3
_LARGEST = 1 << 17


def opened(interface: str) -> socket.socket:
    """Return a socket that gets every frame that arrives on an interface."""
    packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    packets.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    packets.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 23)
    packets.bind((interface, _ETH_P_ALL))
    packets.setblocking(False)
    return packets


def carry(one: str, other: str, delay_s: float, loss: float) -> None:
    """Carry frames both ways until killed."""
    ends = [opened(one), opened(other)]
    draw = random.Random(1)
    late: deque[tuple[float, socket.socket, bytes]] = deque()
    while True:
        wait_s = max(0.0, late[0][0] - time.monotonic()) if late else None
        for ready in select.select(ends, [], [], wait_s)[0]:
            frame, (_, _, kind, *_) = ready.recvfrom(_LARGEST)
            if kind != _PACKET_OUTGOING and draw.random() >= loss:
                late.append((time.monotonic() + delay_s, ends[ready is ends[0]], frame))
        while late and late[0][0] <= time.monotonic():
            _, end, frame = late.popleft()
            try:
                end.send(frame)
            except OSError:  # a full queue loses frames, as on any link
                continue


if __name__ == "__main__":
    carry(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))
