"""Activations of the language model: captured once, shared by every dictionary and evaluation."""
