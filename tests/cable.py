"""A switch of Ethernet frames, as a program: `cable.py DEVICE...` passes what comes in at one device out at the others.

Reads a line at a time what to do with a cable, and answers `ok`: cut NAME, mend NAME, worsen NAME SECONDS SHARE, lost.
Delay and loss are ours and not netem's, which few small kernels have. Losses are drawn from a fixed seed. Ends when its
standard input does.
"""

from __future__ import annotations

import asyncio
import random
import socket
import subprocess
import sys
from dataclasses import dataclass

_ETH_P_ALL, _SOL_PACKET, _PACKET_VNET_HDR, _PACKET_OUTGOING = 3, 263, 15, 4
_FRAME_BYTES = 1 << 17  # a frame may be a whole segment that nobody has cut yet


@dataclass(slots=True)
class Cable:
    """One device, and what happens to frames on their way through it."""

    port: socket.socket
    is_cut: bool = False
    delay_s: float = 0.0
    loss: float = 0.0


class Switch:
    """All cables; a frame goes to every other one, and the hosts take what is theirs."""

    def __init__(self, names: list[str]) -> None:
        self.cables = {name: Cable(_opened(name)) for name in names}
        self.num_lost = 0
        self._chance = random.Random(0)

    def listen(self) -> None:
        for cable in self.cables.values():
            asyncio.get_running_loop().add_reader(cable.port, self._take, cable)

    def obey(self, line: str) -> str:
        verb, *words = line.split()
        if verb == "lost":
            return f"ok {self.num_lost}"
        cable = self.cables[words[0]]
        cable.is_cut = verb == "cut"
        cable.delay_s, cable.loss = (float(words[1]), float(words[2])) if verb == "worsen" else (0.0, 0.0)
        return "ok"

    def _take(self, source: Cable) -> None:
        frame, (_, _, kind, *_) = source.port.recvfrom(_FRAME_BYTES)
        if kind == _PACKET_OUTGOING:  # what we sent ourselves
            return
        for cable in self.cables.values():
            if cable is not source:
                self._pass(frame, source, cable)

    def _pass(self, frame: bytes, source: Cable, target: Cable) -> None:
        if source.is_cut or target.is_cut or self._chance.random() < source.loss + target.loss:
            self.num_lost += 1
            return
        delay_s = source.delay_s + target.delay_s
        if delay_s:
            asyncio.get_running_loop().call_later(delay_s, _send, target, frame)
        else:
            _send(target, frame)


def _opened(name: str) -> socket.socket:
    """With the kernel's own header before each frame: checksums and sizes that it left to be done stay so."""
    subprocess.run(["ip", "link", "set", "dev", name, "up"], check=True)
    port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    port.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    port.bind((name, _ETH_P_ALL))
    port.setblocking(False)
    return port


def _send(target: Cable, frame: bytes) -> None:
    try:
        target.port.send(frame)
    except OSError:  # the link at its other end is down, or its queue is full: a lost frame, as on a real one
        return


async def main(names: list[str]) -> None:
    switch, loop = Switch(names), asyncio.get_running_loop()
    switch.listen()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        print(switch.obey(line.decode()), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
