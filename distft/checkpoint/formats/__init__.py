"""Checkpoints in formats of others: read as sources, written as targets."""
