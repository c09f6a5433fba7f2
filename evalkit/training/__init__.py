"""Trains sparse autoencoders."""
