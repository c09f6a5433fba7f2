"""Language models: GGUF files made loadable (``gguf``), activations and runs from a hook point (``language_model``)."""
