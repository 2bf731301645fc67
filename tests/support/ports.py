"""Picks a free TCP port on localhost."""

import random
import socket


def free_port() -> int:
    """A port that nobody uses, below the range that the kernel assigns to outgoing connections."""
    source = random.SystemRandom()  # pytest plugins seed the global one, so parallel sessions would collide
    while True:
        port = source.randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
