"""Packaged models and corpora: what they are (``catalog``), where from (``sources``), how they get here (``install``)."""
