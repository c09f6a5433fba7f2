"""Upstream features that a feature depends on, level by level."""

from evalkit.evaluations.causal_tree import evaluation as evaluation
