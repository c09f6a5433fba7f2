"""Features that detect a concept."""

from evalkit.evaluations.concepts import evaluation as evaluation
