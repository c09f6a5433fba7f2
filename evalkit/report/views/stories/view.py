"""Case studies: one feature's figure. The view of no evaluation, but of several together."""

from __future__ import annotations

from pathlib import Path

from evalkit.report.views.base import VIEWS, View
from evalkit.report.views.stories.figure import story_figure


@VIEWS.register("stories")
class StoriesView(View):
    """The figure of the feature that is named, or of the one that satisfies the most criteria."""

    by_feature = True

    def draw(self, path: Path, metric: str | None = None, feature: str | None = None) -> None:
        if metric is None:
            story_figure(self.results, path, feature=feature, run=self.run)
        else:
            super().draw(path, metric)
