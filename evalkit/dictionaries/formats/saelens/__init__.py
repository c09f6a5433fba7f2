"""Dictionaries of SAELens."""

from evalkit.dictionaries.formats.saelens import adapter as adapter
