"""Runs a Ray cluster of two nodes with one CPU each until stdin ends: `python two_nodes.py DASHBOARD_PORT`.

Prints the cluster's address once it is up. The nodes are child processes, and end with this one.
"""

import sys

from ray.cluster_utils import Cluster

# By default the agents of all heads use the same port; an agent without its port takes no jobs.
NODE = {"num_cpus": 1, "object_store_memory": 80_000_000, "dashboard_agent_listen_port": 0}


def main() -> None:
    head = {**NODE, "include_dashboard": True, "dashboard_port": int(sys.argv[1])}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
