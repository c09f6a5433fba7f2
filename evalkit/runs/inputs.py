"""What a suite's units read: the language model, the texts, and the activations of both, each made once, on first use.

1. Language model, and windows of fitting and scoring text (disjoint by document).
2. Activations of both at each hook point (``activations.capture``; cached by content).
3. Batches for trainings: from the activations of the fitting text, or streamed from the model (``training.data``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evalkit.activations.capture import Activations, capture, capture_folder
from evalkit.activations.facts import SIDES, Reader, capture_line, text_line, text_row
from evalkit.errors import SuiteError
from evalkit.models.language_model import LanguageModel
from evalkit.suite import Suite
from evalkit.text.corpora import Document
from evalkit.text.split import split_documents
from evalkit.text.windows import TokenWindows, cut_windows, join_windows
from evalkit.training.data.batches import Supply, VectorSupply
from evalkit.training.data.chunks import Chunks, Rule
from evalkit.training.data.stream import StreamSupply
from evalkit.training.settings.config import TrainConfig
from evalkit.util.progress import Progress


class Texts(NamedTuple):
    """Windows to fit on and windows to score on."""

    fit: TokenWindows
    score: TokenWindows


class Inputs:
    """Model, texts and activations of one suite.

    Args:
        suite: what to read.
        folder: results folder; the caches lie below it.
        progress: where long steps are shown.
    """

    def __init__(self, suite: Suite, folder: Path, progress: Progress) -> None:
        self.suite, self.folder, self.progress = suite, folder, progress
        self.cache = folder / "cache" / "activations"
        self._model: LanguageModel | None = None
        self._texts: Texts | None = None
        self._streamed: TokenWindows | None = None
        self._activations: dict[tuple[str, str], Activations] = {}
        self._streams: set[str] = set()
        """Hook points at which trainers were streamed."""

    @property
    def model(self) -> LanguageModel:
        """The language model, loaded on first use; every hook point of the suite is checked then."""
        if self._model is None:
            model = LanguageModel.load(self.suite.model, self.progress, self.suite.corpus.bos)
            for hook_point in self.suite.hook_points:
                model.check_hook_point(hook_point)
            if self.suite.corpus.context > model.context:
                raise SuiteError(
                    f"windows of {self.suite.corpus.context} tokens are longer than the {model.context} the model can read",
                    where=f"{self.suite.path} [corpus] context",
                    fix=f"choose a context of {model.context} or less",
                )
            self._model = model
        return self._model

    @property
    def texts(self) -> Texts:
        """Fitting and scoring windows.

        Raises:
            CorpusError: a source is missing or too small, or a text would stand on both sides.
        """
        if self._texts is None:
            corpus, seed = self.suite.corpus, self.suite.seed
            split = split_documents(corpus.fit, list(corpus.score), share=corpus.score_share, seed=seed)
            fit = self._cut(split.fit, corpus.fit_tokens)
            share = corpus.score_tokens // len(corpus.score)
            parts = [self._cut(part, share) for part in split.score_by_source]
            named = zip(parts, split.sources, strict=True)
            score = join_windows([part._replace(sources=(source,) * len(part.names)) for part, source in named])
            self._texts = Texts(fit, score)
            self.progress.say(text_line("fit", fit))
            self.progress.say(text_line("score", score))
        return self._texts

    @property
    def streamed(self) -> TokenWindows:
        """Windows of fitting text that trainers are streamed: those of ``texts.fit`` and, where more are asked for, more."""
        corpus, wanted = self.suite.corpus, self.suite.training.stream_tokens
        if wanted <= corpus.fit_tokens:
            return self.texts.fit
        if self._streamed is None:
            seed = self.suite.seed
            split = split_documents(corpus.fit, list(corpus.score), share=corpus.score_share, seed=seed)
            self._streamed = self._cut(split.fit, wanted)
            self.progress.say(text_line("stream", self._streamed))
        return self._streamed

    def _cut(self, documents: Sequence[Document], tokens: int) -> TokenWindows:
        corpus, seed = self.suite.corpus, self.suite.seed
        most = corpus.windows_per_document or None
        return cut_windows(documents, self.model.tokenise, corpus.context, tokens, seed, most, self.model.bos)

    def passes(self, config: TrainConfig, hook_point: str) -> float:
        """How often a training with ``config`` presents each activation of the fitting text, on average."""
        if self.suite.training.stream:
            windows, context = self.streamed.tokens.shape
            rows = windows * (context - self.suite.activations.left_out(self.streamed.opening))
        else:
            rows = int(self.fit(hook_point).keep.sum())
        return config.tokens / max(1, rows)

    def supplies(self, config: TrainConfig, hook_points: Sequence[str]) -> dict[str, Supply]:
        """What trainings with the batch and order of ``config`` are fed from, by hook point; streamed ones share one pass of the
        language model.

        Raises:
            CorpusError: there is no text, or the rule for massive activations leaves nothing of it.
        """
        if self.suite.training.stream:
            self._streams |= set(hook_points)
            return self.stream(config, hook_points)
        order: dict[str, Any] = {"batch": config.batch, "seed": config.data_seed, "repeat": self.suite.training.repeat}
        found = {hook_point: self.fit(hook_point) for hook_point in hook_points}
        return {name: VectorSupply(x.kept(), **order, identity=x.identity, where=name) for name, x in found.items()}

    def stream(self, config: TrainConfig, hook_points: Sequence[str]) -> dict[str, Supply]:
        """Streamed batches by hook point; nothing is read yet."""
        session, rule = self.suite.training, self.suite.activations
        windows = self.streamed
        chunks = Chunks(
            self.model,
            windows.tokens,
            windows.identity,
            # on disk for all hook points at once; in memory only what is taken
            self.suite.hook_points if session.shards else hook_points,
            Rule(rule.left_out(windows.opening), rule.norm_multiple),
            shards=self.folder / "cache" / "shards" if session.shards else None,
            waiting_bytes=session.buffer_mb << 20,
        )
        more: dict[str, Any] = {"repeat": session.repeat, "buffer_bytes": session.buffer_mb << 20}
        return {name: StreamSupply(chunks, name, config.batch, config.data_seed, **more) for name in hook_points}

    def fit(self, hook_point: str) -> Activations:
        """Activations of the fitting text."""
        return self._captured("fit", hook_point)

    def score(self, hook_point: str) -> Activations:
        """Activations of the scoring text, under the norm limit measured on the fitting text."""
        return self._captured("score", hook_point)

    def _captured(self, side: str, hook_point: str) -> Activations:
        if (side, hook_point) not in self._activations:
            limit = None if side == "fit" else self.fit(hook_point).limit
            self._activations[side, hook_point] = capture(
                self.model,
                self.texts.fit if side == "fit" else self.texts.score,
                hook_point,
                self.suite.activations,
                self.cache,
                self.progress,
                name=SIDES[side],
                limit=limit,
            )
            self.progress.say(capture_line(side, hook_point, self._activations[side, hook_point]))
        return self._activations[side, hook_point]

    @property
    def bos(self) -> str:
        """The token that texts begin with, as the tokenizer spells it; '' where there is none."""
        return "" if self.model.bos is None else self.model.token_string(self.model.bos)

    def text_rows(self) -> list[dict[str, Any]]:
        """Rows of ``texts``: one for each capture that this workbench has read, and for each hook point that was streamed."""
        sides = {"fit": lambda: self.texts.fit, "score": lambda: self.texts.score}
        if not self._activations and not self._streams:
            return []
        by = Reader(self.bos, self.suite.model.called, self.model.identity)
        rows = [text_row(side, name, sides[side](), x, by) for (side, name), x in self._activations.items()]
        return rows + [text_row("stream", name, self.streamed, None, by) for name in sorted(self._streams)]

    def is_captured(self, hook_point: str) -> bool:
        """Whether both captures at ``hook_point`` would be look-ups."""
        folder, rule = self.cache, self.suite.activations
        if not capture_folder(self.model, self.texts.fit, hook_point, rule, folder, None).exists():
            return False
        return capture_folder(self.model, self.texts.score, hook_point, rule, folder, self.fit(hook_point).limit).exists()
