"""A proxy that makes a store on this machine look far away: a delay both ways and a rate for each connection.

Each direction of a connection has a thread that reads and stamps blocks with the moment they may leave, and
one that sends them then. The bounded queue between holds what is under way and a little more; TCP slows the
sender.
"""

from __future__ import annotations

import multiprocessing
import queue
import socket
import threading
import time
from multiprocessing.connection import Connection
from types import TracebackType

HOST = "127.0.0.1"
BLOCK_SIZE = 1 << 17
BLOCKS_UNDER_WAY = 16

Block = tuple[float, bytes]


class FarStore:
    """The proxy in a process of its own; `port` stands for the store's port. A context manager."""

    def __init__(self, store_port: int, *, round_trip: float, bytes_per_second: float) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        arguments = (theirs, store_port, round_trip, bytes_per_second)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        self.port: int = ours.recv()

    def __enter__(self) -> FarStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.join()


def _serve(parent: Connection, store_port: int, round_trip: float, bytes_per_second: float) -> None:
    with socket.create_server((HOST, 0), backlog=128) as listener:
        parent.send(listener.getsockname()[1])
        while True:
            client, _ = listener.accept()
            arguments = (client, store_port, round_trip, bytes_per_second)
            threading.Thread(target=_link, args=arguments, daemon=True).start()


def _link(client: socket.socket, store_port: int, round_trip: float, bytes_per_second: float) -> None:
    # The client's handshake was answered from near by, so its round trip is paid here.
    time.sleep(round_trip)
    store = socket.create_connection((HOST, store_port))
    for source, target in ((client, store), (store, client)):
        target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        blocks: queue.Queue[Block] = queue.Queue(BLOCKS_UNDER_WAY)
        reading = (source, blocks, round_trip / 2, bytes_per_second)
        threading.Thread(target=_read, args=reading, daemon=True).start()
        threading.Thread(target=_send, args=(target, blocks), daemon=True).start()


def _read(source: socket.socket, blocks: queue.Queue[Block], delay: float, bytes_per_second: float) -> None:
    free_at = 0.0
    data = b"-"
    while data:
        try:
            data = source.recv(BLOCK_SIZE)
        except OSError:
            data = b""
        free_at = max(free_at, time.monotonic()) + len(data) / bytes_per_second
        blocks.put((free_at + delay, data))


def _send(target: socket.socket, blocks: queue.Queue[Block]) -> None:
    """Send what is due until the empty block that stands for the end; then pass the end on."""
    while True:
        due, data = blocks.get()
        time.sleep(max(0.0, due - time.monotonic()))
        try:
            if not data:
                target.shutdown(socket.SHUT_WR)
                return
            target.sendall(data)
        except OSError:
            _drain(blocks)
            return


def _drain(blocks: queue.Queue[Block]) -> None:
    """Take what the reader still puts, so that it sees its own end instead of waiting for room."""
    while blocks.get()[1]:
        pass
