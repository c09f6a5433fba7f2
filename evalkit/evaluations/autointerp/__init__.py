"""Explain-and-simulate scores of features."""

from evalkit.evaluations.autointerp import evaluation as evaluation
