"""The client of Ray Jobs: submit runs to a cluster, list them, follow their logs."""
