"""Causal trees: a view, whose figure and card draw one layout."""

from evalkit.report.views.causal_tree.view import CausalTreeView

__all__ = ["CausalTreeView"]
