"""Computes what the parity phases of `gpu_check.py` compare with, on a machine without a GPU.

    python tools/gpu_check_references.py .wheels/references

The losses of each model in fp32 on a CPU, and the data that they read; minutes. `gpu_check.sh --references`
calls it, and `gpu_check.py` takes from that directory whatever still has the settings of its cases.
"""

import argparse
from pathlib import Path

import torch
from gpu_check_device import Device
from gpu_check_parity import write_references
from gpu_check_product import Session

from distft.run.environment import configure_environment


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    directory: Path = parser.parse_args().directory
    configure_environment("cpu")
    directory.mkdir(parents=True, exist_ok=True)
    write_references(Session(Device(torch.device("cpu")), directory, dry=False))


if __name__ == "__main__":
    main()
