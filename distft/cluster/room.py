"""What a run asks of the cluster, and what there is: pure functions, and one question to Ray."""

from collections.abc import Mapping, Sequence
from typing import Any

import ray

from distft.run.cluster import ClusterConfig

Resources = Mapping[str, float]


def resources_per_worker(cluster: ClusterConfig) -> dict[str, float]:
    """As Ray names them."""
    asked = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    if cluster.memory_bytes_per_worker is not None:
        asked["memory"] = cluster.memory_bytes_per_worker
    return asked


def wanted(cluster: ClusterConfig) -> str:
    """The workers that were asked for, in words."""
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
        text += ", on a node each"
    return text


def room_for(asked: Resources, nodes: Sequence[Resources]) -> int:
    """How many workers that ask for so much each find room in what `nodes` have to give."""
    needs = {name: amount for name, amount in asked.items() if amount > 0}
    # Ray counts in ten-thousandths, and float division of such numbers falls just short.
    return sum(
        min(int(node.get(name, 0.0) / amount + 1e-6) for name, amount in needs.items()) for node in nodes
    )


def nodes_now() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What each node that is alive has, and what of it is free."""
    # Ray's public questions are about the cluster as a whole.
    from ray._private.state import available_resources_per_node

    whole = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return whole, list(available_resources_per_node().values())


def there_is(whole: Sequence[Resources], free: Sequence[Resources]) -> str:
    """What the cluster has, in words."""
    parts = []
    for name, unit in (("CPU", "CPUs"), ("GPU", "GPUs")):
        total, left = (sum(node.get(name, 0.0) for node in nodes) for nodes in (whole, free))
        parts.append(f"{total:g} {unit} ({left:g} free)")
    return f"{len(whole)} nodes with {' and '.join(parts)}"


def draining_nodes() -> set[str]:
    """Ids of the nodes that are about to leave the cluster, as whoever takes them away has announced."""
    return set(ray._private.state.state.get_draining_nodes())  # by what Ray Train's own watcher looks
