"""Runs a search on Ray Tune: each trial is an ordinary `distft train` in processes of its own."""
