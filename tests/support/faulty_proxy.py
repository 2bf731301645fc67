"""A TCP proxy that drops connections, refuses requests and loses responses on demand."""

import contextlib
import select
import socket
import socketserver
import threading
from collections.abc import Iterator
from typing import Any, Literal

Fault = Literal["no agent", "lost answer"]
_NO_AGENT = b"No available agent to submit job, please try again later."


class FaultyProxy(socketserver.ThreadingTCPServer):
    """Forwards bytes between its port and `upstream_port` on this machine."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, port: int, upstream_port: int) -> None:
        super().__init__(("127.0.0.1", port), _Connection)
        self.upstream_port = upstream_port
        self.faults: list[Fault] = []  # one for each of the next connections
        self.num_connections = 0
        self.open: set[socket.socket] = set()

    def cut(self) -> None:
        """Close every open connection."""
        for end in list(self.open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class _Connection(socketserver.BaseRequestHandler):
    server: FaultyProxy

    def handle(self) -> None:
        self.server.num_connections += 1
        fault = self.server.faults.pop(0) if self.server.faults else None
        if fault == "no agent":
            self.request.recv(65_536)
            head = f"HTTP/1.1 500 x\r\nContent-Length: {len(_NO_AGENT)}\r\nConnection: close\r\n\r\n"
            self.request.sendall(head.encode() + _NO_AGENT)
            return
        with socket.create_connection(("127.0.0.1", self.server.upstream_port)) as upstream:
            self.server.open |= {self.request, upstream}
            try:
                with contextlib.suppress(OSError):
                    self._forward(upstream, is_answer_lost=fault == "lost answer")
            finally:
                self.server.open -= {self.request, upstream}

    def _forward(self, upstream: socket.socket, *, is_answer_lost: bool) -> None:
        other: dict[Any, socket.socket] = {self.request: upstream, upstream: self.request}
        while True:
            for end in select.select(list(other), [], [])[0]:
                data = end.recv(65_536)
                if not data or (end is upstream and is_answer_lost):
                    return
                other[end].sendall(data)


@contextlib.contextmanager
def faulty_proxy(port: int, upstream_port: int) -> Iterator[FaultyProxy]:
    """A proxy that listens while the block runs."""
    with FaultyProxy(port, upstream_port) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            proxy.cut()
            thread.join(timeout=10)
