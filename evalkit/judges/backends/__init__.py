"""Where calls are answered: one module for each kind of endpoint (``base`` is the contract)."""
