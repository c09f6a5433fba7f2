"""IOI patching: features ranked ACDC-style, and curves over the number of patches."""

from evalkit.evaluations.ioi import evaluation as evaluation
