"""Readers and writers of the SAE files of other trainers, one module a writer."""
