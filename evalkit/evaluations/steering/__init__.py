"""What clamping or adding a feature does to generated text."""

from evalkit.evaluations.steering import evaluation as evaluation
