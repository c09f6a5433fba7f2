"""The dictionaries of a suite: imported, looked up, fitted or trained, each once.

1. Everything that determines the weights is a recipe, and each dictionary is kept in a folder named by its recipe. The same
   recipe later is a look-up.
2. Baselines are fitted on the activations of the fitting text, under the L0 of another dictionary where ``top_k`` names one.
3. Trained dictionaries are trained together with all that can share their batches (``training_rounds``). A training that was
   killed is resumed from its checkpoint.
4. One that cannot be built is not tried again in this run.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evalkit.activations.facts import disagreement
from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.fitting import mean_active
from evalkit.dictionaries.loading import load_dictionary
from evalkit.dictionaries.provenance import made_with
from evalkit.dictionaries.registry import BASELINES
from evalkit.dictionaries.storage import CARD, save_dictionary
from evalkit.dictionaries.storage import load_dictionary as read_folder
from evalkit.errors import DictionaryError, UnitFailed, as_unit_failed, fails_one_unit
from evalkit.models.names import other_model
from evalkit.runs.inputs import Inputs
from evalkit.runs.training_rounds import Missing, round_of, seeded, train_round, unfinished
from evalkit.suite import DictionarySpec, matched_to
from evalkit.training.settings.config import TrainConfig
from evalkit.util.disk import is_full
from evalkit.util.hashing import content_hash, short

RECIPE_VERSION = 1
"""Raise it whenever the same recipe would give other weights."""


def slug(name: str) -> str:
    """``name`` as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unnamed"


class DictionaryBuilder:
    """Builds what a suite compares.

    Args:
        inputs: model, texts and activations.
        watch: is given each row of a training's history, as rows of ``training_steps`` without run and time.
    """

    def __init__(self, inputs: Inputs, watch: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.inputs, self.suite, self.progress, self.watch = inputs, inputs.suite, inputs.progress, watch
        self.folder = inputs.folder / "dictionaries"
        self.wanted: frozenset[str] | None = None
        """Names of the dictionaries that this run is about; all of the suite's when None."""
        self.trained_now: set[tuple[str, str]] = set()
        """Name and hook point of what this run began to train."""
        self._dictionaries: dict[tuple[str, str], Dictionary] = {}
        self._unbuilt: dict[tuple[str, str], UnitFailed] = {}
        self._tidy = False

    def recipe_folder(self, spec: DictionarySpec, hook_point: str) -> Path:
        """Where the dictionary of this recipe is kept once it has been built."""
        streamed = spec.source == "train" and self.suite.training.stream
        matched = matched_to(spec)
        if streamed:
            read = self.inputs.stream(spec.settings, [hook_point])[hook_point].identity
        else:
            read = self.inputs.fit(hook_point).identity
        recipe: list[Any] = [
            RECIPE_VERSION, spec.source, spec.kind, self._settings(spec), hook_point, self.inputs.model.identity, read,
            self.suite.seed,
        ]  # fmt: skip
        if matched is not None:
            recipe.append(self._recipe_of(self.spec(matched), hook_point))
        return self.folder / f"{slug(spec.name)}-{short(content_hash(recipe))}"

    def _recipe_of(self, spec: DictionarySpec, hook_point: str) -> str:
        """What determines another dictionary: its recipe, or what was imported."""
        if spec.source == "import":
            return self.get(spec, hook_point).identity.hash
        return self.recipe_folder(spec, hook_point).name

    def _settings(self, spec: DictionarySpec) -> dict[str, object]:
        return dataclasses.asdict(spec.settings) if spec.settings is not None else {}

    def is_built(self, spec: DictionarySpec, hook_point: str) -> bool:
        """Whether ``get`` would be a look-up."""
        return spec.source == "import" or (self.recipe_folder(spec, hook_point) / CARD).exists()

    def wants(self, spec: DictionarySpec, hook_point: str) -> bool:
        """Whether this run is about a dictionary that has not failed in it."""
        return (self.wanted is None or spec.name in self.wanted) and (spec.name, hook_point) not in self._unbuilt

    def spec(self, name: str) -> DictionarySpec:
        """The suite's dictionary called ``name``; the suite has checked that there is one."""
        return next(spec for spec in self.suite.dictionaries if spec.name == name)

    def get(self, spec: DictionarySpec, hook_point: str) -> Dictionary:
        """The dictionary of ``spec`` at ``hook_point``: imported, looked up, or built now.

        Raises:
            UnitFailed: it cannot be built (training diverged, more components than dimensions, any exception), or, imported, does
                not fit the model at this hook point. It is not tried again.
        """
        key = (spec.name, hook_point)
        if key in self._unbuilt:
            raise self._unbuilt[key]
        if key not in self._dictionaries:
            try:
                self._dictionaries[key] = self._import_or_build(spec, hook_point)
            except Exception as error:
                if not fails_one_unit(error) or is_full(error):
                    raise
                self._unbuilt[key] = as_unit_failed(error)
            if key in self._unbuilt:
                raise self._unbuilt[key]
        return self._dictionaries[key]

    def _import_or_build(self, spec: DictionarySpec, hook_point: str) -> Dictionary:
        width = self.inputs.model.width(hook_point)
        if spec.source == "import":
            dictionary = load_dictionary(spec.kind, spec.settings.format or None)
            if dictionary.d_in != width:
                raise DictionaryError(
                    f"the dictionary reads vectors of width {dictionary.d_in}, {hook_point} has {width}",
                    where=spec.kind,
                    fix="use the model and hook point it was trained on",
                )
            if dictionary.hook_point and dictionary.hook_point != hook_point and not spec.settings.any_hook_point:
                raise DictionaryError(
                    f"the dictionary was trained at {dictionary.hook_point}, not at {hook_point}",
                    where=spec.kind,
                    fix=f'write hook_points = ["{dictionary.hook_point}"], or any_hook_point = true beside the import',
                )
            for other in (
                other_model(spec.name, dictionary.model, self.suite.model.called, self.inputs.model.identity),
                disagreement(spec.name, made_with(dictionary.details), self.inputs.bos, self.suite.corpus.context),
            ):
                if other:
                    self.progress.say(f"note: {other}")
            return dictionary
        target = self.recipe_folder(spec, hook_point)
        if (target / CARD).exists():
            if spec.source == "train" and not self._tidy:
                unfinished(target.parent)  # removes the checkpoint of a round that ended with everything there
                self._tidy = True
            return read_folder(target)
        if spec.source == "train":
            return self._train(spec, hook_point, target)
        x = self.inputs.fit(hook_point).kept()  # (M, D)
        seed, identity = self.suite.seed, self.inputs.model.identity
        settings, about = self._settings(spec), {}
        if (matched := matched_to(spec)) is not None:
            active = mean_active(self.get(self.spec(matched), hook_point), x, seed)
            settings["top_k"], about = max(1, round(active)), {"top_k_of": matched, "top_k_of_active": active}
        with self.progress.stage(f"fitting {spec.name}"):
            built = BASELINES.get(spec.kind).fit(
                x, seed=seed, hook_point=hook_point, model=identity, progress=self.progress, **settings
            )
        built.details |= about
        if not (target / CARD).exists():  # another process may have made the same dictionary meanwhile
            save_dictionary(built, target)
        return read_folder(target)

    def _train(self, spec: DictionarySpec, hook_point: str, target: Path) -> Dictionary:
        """Train, or resume, with all that can be fed from the same batches."""
        work = round_of(self._companions(spec, hook_point))
        self.trained_now |= {(m.spec.name, m.hook_point) for m in work.missing}
        self._unbuilt |= train_round(self.inputs, work, self.watch)
        if (spec.name, hook_point) in self._unbuilt:
            raise self._unbuilt[spec.name, hook_point]
        return read_folder(target)

    def _companions(self, spec: DictionarySpec, hook_point: str) -> list[Missing]:
        """What can be trained when ``spec`` at ``hook_point`` is: itself first."""

        def feed(config: TrainConfig) -> tuple[int, int, int]:
            return config.batch, config.steps, config.data_seed

        hook_points = [hook_point]
        if self.suite.training.stream:
            hook_points += [other for other in self.suite.hook_points if other != hook_point]
        missing = []
        for here in hook_points:
            for other in [spec, *(entry for entry in self.suite.dictionaries if entry is not spec)]:
                if other.source != "train" or feed(other.settings) != feed(spec.settings):
                    continue
                asked = (other.name, here) == (spec.name, hook_point)
                if asked or (self.wants(other, here) and not self.is_built(other, here)):
                    config = seeded(other.settings, self.suite.seed)
                    missing.append(Missing(other, here, config, self.recipe_folder(other, here)))
        return missing
