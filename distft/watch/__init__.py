"""Heartbeats between ranks: find ranks that hang and ranks that are slow."""
