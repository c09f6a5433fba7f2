"""Case studies: one figure of a feature whose inputs, effect and causes agree."""

from evalkit.report.views.stories import view as view
