"""Rendezvous of ranks after a restart, unaffected by what earlier, dead ranks left in the same store."""

import json
import secrets
import time

from torch._C._distributed_c10d import PrefixStore, Store

from distft.errors import LaunchError

_POLL_INTERVAL_S = 0.02


def fresh_store(store: Store, rank: int, world_size: int, timeout_s: float) -> Store:
    """`store` under a new prefix that all ranks of this attempt agree on. Every rank must call it.

    torchrun's agent keeps its store when it restarts ranks, so the addresses of dead ranks are still in it,
    and agents may disagree on the number of restarts. So each rank writes a random token, rank 0 answers with
    a prefix and the tokens that it has read, and a rank accepts the prefix only if its token is among them.
    Raises `LaunchError` if a rank does not arrive within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    rendezvous_store = PrefixStore("distft/rendezvous", store)
    if rank == 0:
        prefix = _lead(rendezvous_store, world_size, deadline)
    else:
        prefix = _follow(rendezvous_store, rank, deadline)
    return PrefixStore(prefix, store)


def _lead(store: Store, world_size: int, deadline: float) -> str:
    """Rank 0: choose a prefix and wait until every other rank has joined it."""
    prefix = secrets.token_hex(8)
    missing = set(range(1, world_size))
    tokens: dict[str, str] = {}
    while missing:
        arrived = {str(rank): _read(store, f"arrived/{rank}") for rank in missing}
        if any(tokens.get(rank) != token for rank, token in arrived.items()):
            # The store may have a dead rank's token until the live rank overwrites it: answer every change.
            tokens.update(arrived)
            store.set("answer", json.dumps({"prefix": prefix, "tokens": tokens}))
        missing = {rank for rank in missing if _read(store, f"joined/{rank}") != prefix}
        if missing and time.monotonic() > deadline:
            raise LaunchError(
                f"Of {world_size} ranks these did not arrive within timeout_s: {sorted(missing)}. "
                "See their output, or that of their launcher, for the reason."
            )
        time.sleep(_POLL_INTERVAL_S if missing else 0.0)
    return prefix


def _follow(store: Store, rank: int, deadline: float) -> str:
    """Other ranks: write a token and wait for the prefix that answers it."""
    token = secrets.token_hex(8)
    store.set(f"arrived/{rank}", token)
    while time.monotonic() <= deadline:
        answer = _read(store, "answer")
        record = json.loads(answer) if answer else {"tokens": {}}
        if record["tokens"].get(str(rank)) == token:
            prefix = str(record["prefix"])
            store.set(f"joined/{rank}", prefix)
            return prefix
        time.sleep(_POLL_INTERVAL_S)
    raise LaunchError(
        f"Rank 0 did not arrive within timeout_s, so rank {rank} cannot start. See rank 0's output, or that "
        "of its launcher, for the reason."
    )


def _read(store: Store, key: str) -> str:
    """The value of `key`, or an empty string if no rank has set it yet; never blocks."""
    return store.get(key).decode() if store.check([key]) else ""
