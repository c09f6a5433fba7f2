"""The version of evalkit: read by the packaging, the command line and the facts of a run."""

__version__ = "0.1.0"
