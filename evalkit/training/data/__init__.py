"""Batches of activations, from memory or streamed."""
