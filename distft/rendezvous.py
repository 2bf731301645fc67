"""How ranks that have just been started find each other, and not those that died before them."""

import json
import secrets
import time

from torch._C._distributed_c10d import PrefixStore, Store

from distft.errors import LaunchError

_PAUSE_S = 0.02


def fresh_store(store: Store, rank: int, world_size: int, timeout_s: float) -> Store:
    """`store` under a prefix on which the ranks that are alive now agree; called by all of them.

    torchrun's agent keeps its store when it starts ranks again, so the addresses of those that died are still
    in it, and counts of restarts differ between agents. Here each rank brings a token, rank 0 answers with
    the tokens that it found and a prefix, and a rank takes the prefix that comes with its own token.
    Raises `LaunchError` for ranks that do not come within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    mine = PrefixStore("distft/rendezvous", store)
    prefix = _lead(mine, world_size, deadline) if rank == 0 else _follow(mine, rank, deadline)
    return PrefixStore(prefix, store)


def _lead(store: Store, world_size: int, deadline: float) -> str:
    prefix = secrets.token_hex(8)
    missing = set(range(1, world_size))
    tokens: dict[str, str] = {}
    while missing:
        found = {str(rank): _read(store, f"arrived/{rank}") for rank in missing}
        if any(tokens.get(rank) != token for rank, token in found.items()):
            tokens.update(found)
            store.set("answer", json.dumps({"prefix": prefix, "tokens": tokens}))
        missing = {rank for rank in missing if _read(store, f"joined/{rank}") != prefix}
        if missing and time.monotonic() > deadline:
            raise LaunchError(
                f"Of {world_size} ranks these did not come within timeout_s: {sorted(missing)}. "
                "Their own output, or that of their launcher, has the reason."
            )
        time.sleep(_PAUSE_S if missing else 0.0)
    return prefix


def _follow(store: Store, rank: int, deadline: float) -> str:
    token = secrets.token_hex(8)
    store.set(f"arrived/{rank}", token)
    while time.monotonic() <= deadline:
        answer = _read(store, "answer")
        record = json.loads(answer) if answer else {"tokens": {}}
        if record["tokens"].get(str(rank)) == token:
            prefix = str(record["prefix"])
            store.set(f"joined/{rank}", prefix)
            return prefix
        time.sleep(_PAUSE_S)
    raise LaunchError(
        f"Rank 0 did not come within timeout_s, so rank {rank} cannot begin. Its own output, or that of its "
        "launcher, has the reason."
    )


def _read(store: Store, key: str) -> str:
    """Empty where there is nothing yet."""
    return store.get(key).decode() if store.check([key]) else ""
