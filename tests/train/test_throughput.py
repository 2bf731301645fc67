"""The share of the peak: what the rows of each stream cost, and nothing else."""

from dataclasses import replace

import pytest
import torch

from distft.data.batch import Batch, MixedBatch
from distft.model.counts import Flops
from distft.train.throughput import Throughput, peak_flops_per_s

FLOPS = {"text": Flops(100.0, 1.0), "topic": Flops(7.0, 3.0)}


def batch(num_rows: int, width: int) -> Batch:
    return Batch(input_ids=torch.zeros(num_rows, width, dtype=torch.int64), targets={}, num_targets={})


def throughput(flops: dict[str, Flops], recomputed: Flops | None = None) -> Throughput:
    by_stream = None if recomputed is None else dict.fromkeys(flops, recomputed)
    return Throughput(flops=flops, recomputed_flops=by_stream, peak_flops_per_s=lambda: 1e6, world_size=2)


def test_each_stream_costs_what_its_own_heads_cost() -> None:
    measured = throughput(FLOPS, Flops(10.0, 0.0))
    both = MixedBatch({"text": batch(2, 4), "topic": batch(3, 5)})
    for batches in ([both, MixedBatch({"text": batch(1, 4)})], [MixedBatch({"topic": batch(1, 5)})]):
        measured.add_step(batches, num_ranks=2, data_wait_s=0.0)
    found = measured.read()
    num_tokens = 2 * (3 * 4 + 4 * 5)
    elapsed_s = num_tokens / found["tokens_per_s"]
    flops = 2 * (100 * 12 + 3 * 16 + 7 * 20 + 3 * 4 * 25)
    assert found["mfu"] == pytest.approx(flops / (2 * 1e6 * elapsed_s), rel=1e-6)
    assert found["hfu"] - found["mfu"] == pytest.approx(10 * num_tokens / (2 * 1e6 * elapsed_s), rel=1e-6)
    assert measured.read() == {}


def test_tokens_are_real_ones_and_the_work_is_that_of_padding_too() -> None:
    padded = replace(batch(2, 5), lengths=torch.tensor([5, 3]))
    measured = throughput({"": Flops(1.0, 0.0)})
    measured.add_step([padded, padded.without_targets()], num_ranks=2, data_wait_s=0.0)
    found = measured.read()
    elapsed_s = 2 * 8 / found["tokens_per_s"]
    assert found["mfu"] == pytest.approx(2 * 20 / (2 * 1e6 * elapsed_s), rel=1e-6)


def test_packed_documents_cost_the_pairs_within_them() -> None:
    packed = Batch(
        input_ids=torch.zeros(1, 5, dtype=torch.int64),
        targets={},
        num_targets={},
        position_ids=torch.tensor([[0, 1, 2, 0, 1]]),
        document_ids=torch.tensor([[0, 0, 0, 1, 1]]),
    )
    measured = throughput({"": Flops(0.0, 1.0)})
    measured.add_step([packed], num_ranks=2, data_wait_s=0.5)
    found = measured.read()
    elapsed_s = 10 / found["tokens_per_s"]
    assert found["mfu"] == pytest.approx(2 * (9 + 4) / (2 * 1e6 * elapsed_s), rel=1e-6)
    assert found["data_wait_s"] == 0.5


def test_pairs_in_a_window_have_a_cost_of_their_own() -> None:
    rows = replace(batch(1, 4), counted_pairs=16, counted_local_pairs=10)
    measured = throughput({"": Flops(0.0, 1.0, 3.0)}, Flops(0.0, 0.0, 2.0))
    measured.add_step([rows], num_ranks=2, data_wait_s=0.0)
    found = measured.read()
    elapsed_s = 8 / found["tokens_per_s"]
    assert found["mfu"] == pytest.approx(2 * (16 + 3 * 10) / (2 * 1e6 * elapsed_s), rel=1e-6)
    assert found["hfu"] - found["mfu"] == pytest.approx(2 * 2 * 10 / (2 * 1e6 * elapsed_s), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40G", None),  # known by none of these names: measured
        ("NVIDIA H100", None),
        ("NVIDIA A100", None),
    ],
)
def test_the_peak_of_a_gpu_is_that_of_its_exact_name_or_measured(
    monkeypatch: pytest.MonkeyPatch, name: str, tflops: float | None
) -> None:
    """By the data sheets: dense products in bf16."""
    device = torch.device("cuda", 1)
    monkeypatch.setattr("torch.cuda.get_device_name", {device: name}.__getitem__)
    monkeypatch.setattr("distft.train.throughput.measured_flops_per_s", lambda *_: 1.5e12)
    expected = 1.5e12 if tflops is None else tflops * 1e12
    assert peak_flops_per_s(device, torch.bfloat16) == expected
    assert peak_flops_per_s(device, torch.float16) == expected
    assert peak_flops_per_s(device, torch.float32) == 1.5e12
