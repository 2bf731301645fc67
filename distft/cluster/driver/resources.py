"""The resources that a run requests and those that a cluster has: counted per node, described in words."""

from collections.abc import Mapping, Sequence
from typing import Any

import ray

from distft.cluster.ray_internals import free_resources_per_node
from distft.run.cluster_config import ClusterConfig

Resources = Mapping[str, float]  # by Ray's names, such as CPU, GPU and memory (in bytes)


def resources_per_worker(cluster: ClusterConfig) -> dict[str, float]:
    """The resources that each worker requests."""
    requested = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    if cluster.memory_bytes_per_worker is not None:
        requested["memory"] = cluster.memory_bytes_per_worker
    return requested


def describe_request(cluster: ClusterConfig) -> str:
    """The requested workers in words."""
    count = str(cluster.max_workers)
    if cluster.is_elastic:
        count = f"{cluster.min_workers} to {cluster.max_workers}"
    each = [f"{cluster.cpus_per_worker:g} CPUs", f"{cluster.gpus_per_worker:g} GPUs"]
    if cluster.memory_bytes_per_worker is not None:
        each.append(f"{cluster.memory_bytes_per_worker / 1e9:.3g} GB of memory")
    text = f"{count} workers with {' and '.join(each)} each"
    if cluster.accelerator_type is not None:
        text += f" ({cluster.accelerator_type})"
    if cluster.placement == "STRICT_SPREAD":
        text += ", each on a node of its own"
    return text


def num_workers_that_fit(requested: Resources, nodes: Sequence[Resources]) -> int:
    """How many workers, each of which needs `requested`, fit on `nodes`."""
    needs = {name: amount for name, amount in requested.items() if amount > 0}
    # Ray counts in ten-thousandths, and float division of such numbers falls just short.
    return sum(
        min(int(node.get(name, 0.0) / amount + 1e-6) for name, amount in needs.items()) for node in nodes
    )


def node_resources() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Ask Ray for the total and the free resources of each node that is alive."""
    total = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return total, free_resources_per_node()


def describe_capacity(total: Sequence[Resources], free: Sequence[Resources]) -> str:
    """The cluster's nodes, CPUs and GPUs in words."""
    amounts = []
    for name, unit in (("CPU", "CPUs"), ("GPU", "GPUs")):
        num_total, num_free = (sum(node.get(name, 0.0) for node in nodes) for nodes in (total, free))
        amounts.append(f"{num_total:g} {unit} ({num_free:g} free)")
    return f"{len(total)} nodes with {' and '.join(amounts)}"
