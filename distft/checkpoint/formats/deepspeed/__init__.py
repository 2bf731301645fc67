"""Checkpoints of DeepSpeed: reads ZeRO stages 0 to 3 and the universal format, and writes them."""
