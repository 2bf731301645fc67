"""distft trains Transformers from raw text to a fine-tuned model, on one machine or an elastic cluster."""

__version__ = "0.1.0"
