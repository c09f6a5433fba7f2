"""Concepts, the texts that show them, and their surface statistics."""
