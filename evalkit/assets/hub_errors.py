"""What may be raised where the Hugging Face hub is asked for something and cannot give it.

Its library has changed the HTTP client below it, so the client's own base class is read from the library's.
"""

from __future__ import annotations


def hub_errors() -> tuple[type[Exception], ...]:
    """Classes to catch around calls of huggingface_hub; also quiets its log of attempts, which the message replaces."""
    from huggingface_hub import errors
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    transport = [cls for cls in errors.HfHubHTTPError.__mro__ if cls.__name__ == "HTTPError"]
    return (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError, *transport)
