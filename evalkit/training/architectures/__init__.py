"""The architectures that can be trained, one a module."""
