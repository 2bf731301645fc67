"""Other checkpoint formats: DeepSpeed's and transformers' are read as sources and written as targets."""
