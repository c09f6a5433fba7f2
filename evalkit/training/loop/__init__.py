"""The training loop: steps, history, checkpoints."""
