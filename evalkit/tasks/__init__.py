"""Pairs of prompts that differ in one thing, and what a language model should answer to each."""
