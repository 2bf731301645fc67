"""The driver of one run on Ray Train."""
