"""The run on a Ray cluster: placed, watched, started again. Nothing below this floor knows of Ray."""
