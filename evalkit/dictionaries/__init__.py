"""Dictionaries: anything that turns activations into feature codes and back."""
