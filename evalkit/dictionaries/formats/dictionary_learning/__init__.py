"""Dictionaries of dictionary_learning."""

from evalkit.dictionaries.formats.dictionary_learning import adapter as adapter
