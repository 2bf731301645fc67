"""Assembles a run from its configuration."""
