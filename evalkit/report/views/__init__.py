"""Figures, feature cards and terminal text, one module an evaluation."""
