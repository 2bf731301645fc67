"""distft: text to a fine-tuned Transformer, on one machine or on a cluster whose nodes come and go."""

__version__ = "0.1.0"
