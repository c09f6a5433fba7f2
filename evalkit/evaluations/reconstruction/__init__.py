"""How faithful a dictionary is to activations and to the model."""

from evalkit.evaluations.reconstruction import evaluation as evaluation
