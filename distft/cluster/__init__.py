"""Runs on a Ray cluster: submit, place, restart and resize them. Only this package imports ray."""
