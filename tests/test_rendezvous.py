"""Restarted ranks find each other, and no dead ones, in a store that outlived an earlier attempt."""

import threading
import time
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore

from distft.errors import LaunchError
from distft.rendezvous import fresh_store


def _rendezvous(store: Any, delays_s: list[float], *, timeout_s: float = 10.0) -> list[Any]:
    """Each rank's store, or the error that it raised; rank i arrives after `delays_s[i]`."""
    results: list[Any] = [None] * len(delays_s)

    def arrive(rank: int) -> None:
        time.sleep(delays_s[rank])
        try:
            fresh = fresh_store(store, rank, len(delays_s), timeout_s)
            fresh.set(f"address/{rank}", "here")
            results[rank] = fresh
        except LaunchError as error:
            results[rank] = error

    threads = [threading.Thread(target=arrive, args=(rank,)) for rank in range(len(delays_s))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("delays_s", [[0.0], [0.1, 0.0], [0.0, 0.1], [0.05, 0.0, 0.1], [0.0, 0.1, 0.05]])
def test_each_attempt_sees_its_own_ranks_and_none_of_the_attempt_before(delays_s: list[float]) -> None:
    store = HashStore()
    addresses = [f"address/{rank}" for rank in range(len(delays_s))]
    for world_size in (len(delays_s), len(delays_s), max(1, len(delays_s) - 1)):
        stores = _rendezvous(store, delays_s[:world_size])
        assert all(fresh.check(addresses[:world_size]) for fresh in stores)
        assert not any(fresh.check(["mark"]) for fresh in stores)
        stores[0].set("mark", "of this attempt")
        assert all(fresh.check(["mark"]) for fresh in stores)


def test_a_missing_rank_is_named_even_if_an_earlier_attempt_had_a_rank_of_that_number() -> None:
    store = HashStore()
    _rendezvous(store, [0.0, 0.0, 0.0])
    ranks = [threading.Thread(target=lambda: fresh_store(store, 1, 3, 5.0))]
    ranks[0].start()
    with pytest.raises(LaunchError, match=r"Of 3 ranks these did not arrive .*: \[2\]"):
        fresh_store(store, 0, 3, 0.5)
    ranks[0].join()


def test_without_rank_0_the_other_ranks_raise() -> None:
    store = HashStore()
    _rendezvous(store, [0.0, 0.0])
    with pytest.raises(LaunchError, match="Rank 0 did not arrive"):
        fresh_store(store, 1, 2, 0.2)
