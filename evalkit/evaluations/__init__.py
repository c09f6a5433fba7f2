"""Evaluations: one file each, from (model, dictionary, judge, config) to rows."""
