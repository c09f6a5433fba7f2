"""A baseline, an architecture and a format from outside the package: one module, named with --plugin.

An evaluation of one's own is in test_docs, a judge in test_judge_backends, a view in test_views.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from suite_case import tiny_suite

import evalkit
from evalkit.cli import main
from evalkit.dictionaries.formats.base import FORMATS
from evalkit.dictionaries.registry import BASELINES
from evalkit.training.architectures.base import TRAINABLES

OWN = '''
from dataclasses import dataclass

import torch

from evalkit.dictionaries.autoencoder import Wiring
from evalkit.dictionaries.formats.base import FORMATS, Format, matrix
from evalkit.dictionaries.random_directions import RandomDirections
from evalkit.dictionaries.registry import baseline
from evalkit.dictionaries.relu import ReLU
from evalkit.training.architectures.base import TRAINABLES
from evalkit.training.architectures.relu import TrainableReLU


@dataclass(frozen=True)
class SampleSettings:
    """Settings of own_sample."""

    features: int = 8
    """Activation vectors taken as directions."""


@baseline("own_sample", SampleSettings)
def fit_sample(x, config, fitting):
    """The first activation vectors as directions."""
    rows = torch.as_tensor(x[: config.features])
    zeros = torch.zeros(len(rows)), torch.zeros(x.shape[1])
    return RandomDirections(rows, zeros[0], rows, zeros[1], rectified=True, details={}, **fitting.where)


@TRAINABLES.register("own_relu")
class OwnReLU(TrainableReLU):
    """ReLU with a smaller first learning rate."""

    default_lr = 5e-4


class OwnFormat(Format):
    """NAME.own.npz: encoder and decoder, no biases."""

    name, title = "own_npz", "own: NAME.own.npz"

    def recognise(self, place):
        return place.find("*.own.npz") is not None

    def read(self, place):
        weights = place.weights(place.find("*.own.npz"))
        encoder, decoder = (matrix(weights, name, (-1, -1), place) for name in ("encoder", "decoder"))
        biases = {"b_enc": torch.zeros(len(decoder)), "b_dec": torch.zeros(len(encoder))}
        return ReLU({"W_enc": encoder, "W_dec": decoder, **biases}, Wiring(), details={"format": self.name})


FORMATS.register(OwnFormat.name)(OwnFormat())
'''

DICTIONARIES = """
[[dictionary]]
name = "sample"
baseline = "own_sample"
features = 6

[[dictionary]]
name = "own trained"
train = { architecture = "own_relu", features = 32, tokens = 1024, batch = 128 }

[[dictionary]]
name = "own file"
import = "small.own.npz"
"""


def test_a_baseline_an_architecture_and_a_format_are_one_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for registry in (BASELINES, TRAINABLES, FORMATS):
        registry.names()
        monkeypatch.setattr(registry, "_items", dict(registry._items))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_things.py").write_text(OWN)
    suite = tiny_suite(tmp_path, extra=DICTIONARIES)
    width = 32
    rng = np.random.default_rng(0)
    encoder = rng.normal(size=(width, 12)).astype(np.float32)
    np.savez(tmp_path / "small.own.npz", encoder=encoder, decoder=encoder.T.copy())
    store = tmp_path / "out" / "evalkit.duckdb"
    command = ["run", str(suite), "--plugin", "own_things", "--only", "reconstruction", "--results", str(store), "--quiet"]
    code = main(command)
    assert code == 0, capsys.readouterr().err
    with evalkit.open_results(store) as results:
        table = results.table("reconstruction").set_index(["dictionary", "metric"])["mean"]
        kinds = results.dictionaries().set_index("names")["n_features"]
    assert (kinds["sample"], kinds["own trained"], kinds["own file"]) == (6, 32, 12)
    assert all(table[name, "l0"] >= 0 for name in ("sample", "own trained", "own file"))
    monkeypatch.delitem(sys.modules, "own_things", raising=False)
