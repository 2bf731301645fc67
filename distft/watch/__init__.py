"""Ranks look after each other: beats, verdicts on ranks that hang, notes on ranks that are slow."""
