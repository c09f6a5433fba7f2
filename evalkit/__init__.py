"""evalkit: automated interpretability and evaluation of sparse autoencoders on language models."""

__version__ = "0.1.0"
