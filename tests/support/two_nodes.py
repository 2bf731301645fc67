"""A real Ray cluster of two nodes with one CPU each, in processes of its own.

As a program, `two_nodes.py DASHBOARD_PORT`, it is that cluster: it prints its address once it is up. A line
on stdin kills the second node without notice. The nodes are child processes, and end with this one, which
ends with its stdin.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

# By default the agents of all heads use the same port; an agent without its port takes no jobs.
_NODE = {"num_cpus": 1, "object_store_memory": 80_000_000, "dashboard_agent_listen_port": 0}


@contextmanager
def two_nodes(
    environment: Mapping[str, str], dashboard_port: int
) -> Iterator[tuple[str, Callable[[], None]]]:
    """The cluster's address within the block, and a function that kills its second node."""
    with subprocess.Popen(
        [sys.executable, __file__, str(dashboard_port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    ) as nodes:
        assert nodes.stdin is not None
        assert nodes.stdout is not None
        address = nodes.stdout.readline().strip()
        assert address, "the cluster did not start"

        def kill_second() -> None:
            assert nodes.stdin is not None
            nodes.stdin.write("kill\n")
            nodes.stdin.flush()

        try:
            yield address, kill_second
        finally:
            nodes.stdin.close()
            nodes.wait(timeout=60)


def main() -> None:
    from ray.cluster_utils import Cluster

    head = {**_NODE, "include_dashboard": True, "dashboard_port": int(sys.argv[1])}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    second = cluster.add_node(**_NODE)
    cluster.wait_for_nodes()
    print(cluster.address, flush=True)
    if sys.stdin.readline():
        cluster.remove_node(second, allow_graceful=False)
        sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
