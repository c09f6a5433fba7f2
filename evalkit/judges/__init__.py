"""Judges: whatever explains features and simulates their activations."""
