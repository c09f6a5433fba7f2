"""Where calls are answered: one module for each kind of endpoint (``judges.requests`` is the contract)."""
