"""Causal trees: read from a results file, laid out once, drawn in a figure or on the page, and written as data."""
