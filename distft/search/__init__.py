"""Searches over settings of runs: space, configurations of trials, journal and ranking, without Ray."""
