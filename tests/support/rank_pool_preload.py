"""Modules that the fork server of `rank_pool` imports once, so that no rank has to."""

import contextlib
import gc
import importlib
import logging
import pkgutil
from collections.abc import Iterator

import deepspeed.ops

import distft

# Ray and the command line start ranks but do not run in one, and importing Ray alone takes 2 s.
_NOT_IN_A_RANK = ("distft.__main__", "distft.cli", "distft.cluster")


def _modules() -> Iterator[str]:
    yield "pytest"  # test modules import it
    yield "support.rank_pool"  # the ranks' entry point
    yield "torch._dynamo"  # the first optimizer imports it: 2.0 s
    yield "deepspeed.runtime.zero.muon.muon_optimizer"  # each DeepSpeed engine imports it: 1.9 s
    for module in pkgutil.walk_packages(distft.__path__, "distft."):
        if not module.name.startswith(_NOT_IN_A_RANK):
            yield module.name


for _name in _modules():
    # If an import fails here, the rank that needs the module fails and shows the traceback.
    with contextlib.suppress(Exception):
        importlib.import_module(_name)

# Its shared-memory collectives are compiled on first use (50-98 s) and change no result.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
gc.freeze()  # keeps the ranks' garbage collectors from touching, and so copying, the shared memory
