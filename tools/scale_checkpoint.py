"""The cost of a checkpoint's bookkeeping as parameters x ranks grow: `python tools/benchmark.py scale`.

The manifest of a model that `num_ranks` ranks saved under ZeRO 3 is made without its tensors. A rank that
resumes then parses it and locates its part of every parameter in the files; rank 0 writes it in a save.
"""

import json
import math
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.manifest import FileRecord, Manifest, ParameterRecord, Progress, StateRecord

_LAYERS, _NUM_RANKS = 80, 512  # of the model of 70B parameters that is the largest here
_WIDTH, _KV_WIDTH, _FF_WIDTH, _VOCAB = 8192, 1024, 28672, 128256
_SMALL_NUMEL = 100_000  # DeepSpeed's default: ZeRO 3 keeps smaller parameters whole on every rank
SCALES = (1, 10, 100)


@dataclass(frozen=True, slots=True)
class ScaleRow:
    """The cost of one amount of work."""

    work: str
    amount: int  # parameters x ranks
    requests: int  # to the storage
    bytes: int  # of the manifest
    seconds: float  # of the rank that does it
    peak_mib: float  # of its process, above an idle one


def model_shapes(num_layers: int) -> dict[str, tuple[int, ...]]:
    """Parameters of a Llama with `num_layers` layers; 80 make 70B."""
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (_VOCAB, _WIDTH)}
    for layer in range(num_layers):
        shapes |= {
            f"blocks.{layer}.attn.norm.weight": (_WIDTH,),
            f"blocks.{layer}.attn.q.weight": (_WIDTH, _WIDTH),
            f"blocks.{layer}.attn.k.weight": (_KV_WIDTH, _WIDTH),
            f"blocks.{layer}.attn.v.weight": (_KV_WIDTH, _WIDTH),
            f"blocks.{layer}.attn.out.weight": (_WIDTH, _WIDTH),
            f"blocks.{layer}.mlp.norm.weight": (_WIDTH,),
            f"blocks.{layer}.mlp.gate.weight": (_FF_WIDTH, _WIDTH),
            f"blocks.{layer}.mlp.up.weight": (_FF_WIDTH, _WIDTH),
            f"blocks.{layer}.mlp.down.weight": (_WIDTH, _FF_WIDTH),
        }
    return {**shapes, "norm.weight": (_WIDTH,), "lm_head.weight": (_VOCAB, _WIDTH)}


def part(numel: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """The elements that a rank has of a parameter under ZeRO 3."""
    per_rank = -(-numel // num_ranks)
    return min(rank * per_rank, numel), min((rank + 1) * per_rank, numel)


def make_manifest(num_layers: int, num_ranks: int) -> Manifest:
    """The manifest of a model that so many ranks saved."""
    shapes = model_shapes(num_layers)
    states = {
        name: StateRecord(dtype="float32", fingerprint="0123456789abcdef")
        for name in (WEIGHT, "exp_avg", "exp_avg_sq")
    }
    return Manifest(
        run_id="scale",
        progress=Progress(step=1),
        config={},
        written_by={"world_size": num_ranks},
        parameters={
            name: ParameterRecord(shape=shape, trainable=True, updates=1, states=states)
            for name, shape in shapes.items()
        },
        files=[
            FileRecord(
                name=f"rank_{rank:05d}_0123abcd.safetensors",
                num_bytes=1 << 30,
                checksum="xxh3:0123456789abcdef",
                intervals={name: part(math.prod(shape), rank, num_ranks) for name, shape in shapes.items()},
            )
            for rank in range(num_ranks)
        ],
    )


def locate_own_part(checkpoint: Checkpoint, num_ranks: int) -> int:
    """What a rank reads in a resume on as many ranks; returns its requests for state."""
    rank, requests = num_ranks // 2, 0
    for name, record in checkpoint.manifest.parameters.items():
        numel = math.prod(record.shape)
        # The partition with its states; of a small parameter also the share that it sends to all ranks.
        reads = len(record.states) + (numel < _SMALL_NUMEL)
        start, stop = part(numel, rank, num_ranks)
        pieces = checkpoint.locate(name, start, stop) if stop > start else []
        requests += reads * len(pieces)
    return requests


def _measure(work: str, num_layers: int, num_ranks: int) -> ScaleRow:
    """One row; run in a process of its own, because of the peak."""
    amount = len(model_shapes(num_layers)) * num_ranks
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "manifest"
        # Made by another process, so that it does not count in this one's memory.
        subprocess.run([sys.executable, __file__, "make", str(num_layers), str(num_ranks), path], check=True)
        sent = path.read_bytes()
    data = zlib.decompress(sent)
    num_bytes = len(data)
    manifest = Manifest.from_bytes(data, "manifest") if work == "write" else None
    del data
    Path("/proc/self/clear_refs").write_text("5")
    idle_mib = _peak_mib()
    began = time.perf_counter()
    if manifest is not None:
        written = zlib.compress(manifest.to_bytes(), level=1)
        requests = 1
        assert written
    else:
        checkpoint = Checkpoint("scale", Manifest.from_bytes(zlib.decompress(sent), "manifest"))
        requests = locate_own_part(checkpoint, num_ranks)
    seconds = time.perf_counter() - began
    labels = {"write": "rank 0 writes the manifest", "load": "a rank parses it and locates its part"}
    return ScaleRow(
        labels[work], amount, requests, num_bytes, round(seconds, 3), round(_peak_mib() - idle_mib, 1)
    )


def _peak_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def scale_rows() -> list[ScaleRow]:
    """Rows at 1, 10 and 100 times the work: ranks and layers grow together up to 70B x 512."""
    rows = []
    for scale in SCALES:
        share = math.sqrt(scale / SCALES[-1])
        num_layers, num_ranks = round(_LAYERS * share), round(_NUM_RANKS * share)
        for work in ("write", "load"):
            command = [sys.executable, __file__, work, str(num_layers), str(num_ranks)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append(ScaleRow(**json.loads(done.stdout)))
    return rows


def main() -> None:
    """`make LAYERS RANKS FILE`, `write LAYERS RANKS`, `load LAYERS RANKS`; nothing: print all rows."""
    match sys.argv[1:]:
        case ["make", num_layers, num_ranks, path]:
            manifest = make_manifest(int(num_layers), int(num_ranks))
            Path(path).write_bytes(zlib.compress(manifest.to_bytes(), level=1))
        case [("write" | "load") as work, num_layers, num_ranks]:
            print(json.dumps(asdict(_measure(work, int(num_layers), int(num_ranks)))))
        case _:
            for row in scale_rows():
                print(json.dumps(asdict(row)))


if __name__ == "__main__":
    main()
