"""Resources of a run and of a cluster, counted and described."""

import pytest

from distft.cluster.driver.resources import describe_capacity, describe_request, num_workers_that_fit
from distft.run.cluster_config import ClusterConfig


@pytest.mark.parametrize(
    ("requested", "nodes", "expected"),
    [
        ({"CPU": 1.0}, [{"CPU": 2.0}, {"CPU": 1.0}], 3),
        ({"CPU": 1.0, "GPU": 1.0}, [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0}], 2),
        ({"CPU": 0.1}, [{"CPU": 0.3}], 3),
        ({"CPU": 1.0, "GPU": 0.0}, [{"CPU": 0.5}, {"CPU": 0.5}], 0),
        ({"CPU": 1.0, "memory": 2e9}, [{"CPU": 4.0, "memory": 5e9}], 2),
    ],
)
def test_workers_are_counted_node_by_node(
    requested: dict[str, float], nodes: list[dict[str, float]], expected: int
) -> None:
    assert num_workers_that_fit(requested, nodes) == expected


def test_the_request_names_the_number_of_workers_and_the_resources_of_each() -> None:
    cluster = ClusterConfig.model_validate(
        {
            "workers": {"min": 2, "max": 5},
            "gpus_per_worker": 1,
            "accelerator_type": "H100",
            "placement": "SPREAD",
        }
    )
    assert describe_request(cluster) == "2 to 5 workers with 1 CPUs and 1 GPUs each (H100)"


def test_the_capacity_names_total_and_free_resources() -> None:
    nodes = [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 4.0}]
    text = describe_capacity(nodes, [{"CPU": 1.0}])
    assert text == "2 nodes with 8 CPUs (1 free) and 1 GPUs (0 free)"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": {"min": 3, "max": 2}}, "min=3"),
        ({"workers": 0}, "workers=0"),
        ({"workers": {"max": 2}, "placement": "STRICT_SPREAD"}, "STRICT_SPREAD"),
        ({"accelerator_type": "H100"}, "gpus_per_worker=0"),
    ],
)
def test_a_request_that_no_cluster_can_satisfy_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClusterConfig.model_validate(settings)
