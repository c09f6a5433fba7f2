"""Geometry: planted directions and firings whose metrics are known, keys that follow ``against``, rows in the results file."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from suite_case import tiny_suite

import evalkit
from evalkit.activations.capture import Activations
from evalkit.dictionaries import similarity
from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.controls import Mean
from evalkit.dictionaries.jumprelu import JumpReLU
from evalkit.dictionaries.linear import LinearDictionary
from evalkit.dictionaries.neurons import Neurons
from evalkit.dictionaries.pca import PCA
from evalkit.dictionaries.tied import Tied
from evalkit.errors import CorpusError, DictionaryError, SuiteError
from evalkit.evaluations import geometry
from evalkit.evaluations.base import EVALUATIONS, Result
from evalkit.evaluations.geometry import Geometry, GeometryConfig
from evalkit.runs.plan import unit_key, units
from evalkit.runs.run import run
from evalkit.runs.workbench import Workbench
from evalkit.suite import load_suite
from evalkit.util.caching import Recent
from evalkit.util.progress import Progress

N, T, D = 8, 10, 12
CONFIG = GeometryConfig(alive_threshold=3)
identities = itertools.count()


class PlainBench:
    """Scoring activations and named dictionaries."""

    hook_point, seed = "blocks.0.hook_resid_post", 7
    progress = Progress(quiet=True)

    def __init__(self, x: torch.Tensor, keep: torch.Tensor | None = None, **named: Dictionary) -> None:
        keep = torch.ones(x.shape[:2], dtype=torch.bool) if keep is None else keep
        windows = torch.arange(len(x))
        self._score = Activations(x, keep, keep.long(), windows, f"geometry-{next(identities)}", float("inf"))
        self._named = named

    def score(self) -> Activations:
        return self._score

    def dictionary(self, name: str) -> Dictionary:
        return self._named[name]


def sae(W_dec: torch.Tensor, W_enc: torch.Tensor | None = None, b_enc: float = 0.0) -> JumpReLU:
    """A ReLU autoencoder without centre that reads the transposed decoder unless told otherwise."""
    features, width = W_dec.shape
    W_enc = W_dec.T.contiguous() if W_enc is None else W_enc
    zeros = {"threshold": torch.zeros(features), "b_dec": torch.zeros(width)}
    return JumpReLU({"W_enc": W_enc, "b_enc": torch.full((features,), b_enc), "W_dec": W_dec, **zeros})


def unit(count: int, width: int, seed: int) -> torch.Tensor:
    rows = np.random.default_rng(seed).standard_normal((count, width))
    return torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True)).float()


def dense_bench(width: int, **named: Dictionary) -> PlainBench:
    """Activations on which every direction fires often."""
    generator = torch.Generator().manual_seed(1)
    return PlainBench(torch.randn(N, T, width, generator=generator), **named)


def values(result: Result, metric: str) -> dict[int, float | None]:
    return {score.item: score.value for score in result.scores if score.metric == metric}


def mean(result: Result, metric: str) -> float:
    found = [value for value in values(result, metric).values() if value is not None]
    assert found
    return sum(found) / len(found)


def against(name: str, **more: object) -> GeometryConfig:
    return dataclasses.replace(CONFIG, against=name, **more)  # type: ignore[arg-type]


def test_it_is_registered_and_describes_what_it_returns():
    assert EVALUATIONS.get("geometry") is Geometry
    bench = dense_bench(D, other=sae(unit(9, D, 2)))
    result = Geometry().run(bench, sae(unit(7, D, 1)), against("other"))
    assert {score.metric for score in result.scores} == set(Geometry.metrics)
    assert all(metric.null in ("", *Geometry.metrics) for metric in Geometry.metrics.values())
    assert Geometry().uses(CONFIG) == [] and Geometry().uses(against("other")) == ["other"]


def test_alive_and_density_of_planted_firings():
    x = torch.zeros(N, T, 4)
    x[:2, :5, 0] = 1.0  # feature 0 fires on 10 kept tokens
    x[0, :3, 1] = 2.0  # feature 1 on 3
    x[3, 9, 2] = 1.0  # feature 2 only where the position is left out
    keep = torch.ones(N, T, dtype=torch.bool)
    keep[3, 9] = False
    for encoded in (sae(torch.eye(4)), Neurons(torch.tensor(1.0), torch.zeros(4), rectified=True)):
        result = Geometry().run(PlainBench(x, keep), encoded, CONFIG)
        kept = N * T - 1
        assert values(result, "density") == {0: 10 / kept, 1: 3 / kept, 2: 0.0, 3: 0.0}
        assert values(result, "alive") == {0: 1.0, 1: 0.0, 2: 0.0, 3: 0.0}  # more often than 3 times
        assert all(score.n == kept for score in result.scores if score.metric in ("alive", "density"))


def test_firings_do_not_depend_on_the_size_of_blocks_or_on_the_sparse_path(monkeypatch):
    bench = dense_bench(D)
    dictionary = sae(unit(20, D, 3), b_enc=-0.5)
    expected = (dictionary.encode(bench.score().kept()) != 0).double().mean(0)
    for codes in (1, 1 << 24):
        monkeypatch.setattr("evalkit.util.batching.MOST", codes)
        monkeypatch.setattr(geometry, "_firings", Recent(1))
        result = Geometry().run(bench, dictionary, CONFIG)
        assert list(values(result, "density").values()) == pytest.approx(expected.tolist(), abs=0)
    assert min(expected) > 0 and max(expected) < 1


def test_firings_are_counted_once_for_units_that_compare_with_them(monkeypatch):
    a, b = sae(unit(5, D, 1)), sae(unit(6, D, 2))
    bench = dense_bench(D, b=b)
    counted = []
    count = geometry._count
    monkeypatch.setattr(geometry, "_count", lambda *args: counted.append(args[2]) or count(*args))
    first = Geometry().run(bench, a, against("b"))
    assert Geometry().run(bench, a, against("b")) == first
    Geometry().run(bench, b, CONFIG)
    assert counted == [a, b]


def test_encoder_decoder_cosine():
    write = torch.eye(3)
    read = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 4.0], [0.0, 0.0, -1.0]]).T.contiguous()
    bench = dense_bench(3)
    assert values(Geometry().run(bench, sae(write, read), CONFIG), "encoder_cosine") == pytest.approx({0: 1.0, 1: 0.6, 2: -1.0})
    assert mean(Geometry().run(bench, Tied(write, torch.zeros(3)), CONFIG), "encoder_cosine") == pytest.approx(1)
    assert mean(Geometry().run(bench, Neurons(torch.tensor(0.5), torch.zeros(3), True), CONFIG), "encoder_cosine") == 1
    writes = 3 * torch.tensor([[0.6, 0.8, 0.0], [0.0, 1.0, 0.0]])
    linear: LinearDictionary = PCA(torch.eye(3)[:2], torch.zeros(2), writes, torch.zeros(3), rectified=False)
    assert values(Geometry().run(bench, linear, CONFIG), "encoder_cosine") == pytest.approx({0: 0.6, 1: 1.0})


def test_what_has_no_direction_is_undefined():
    result = Geometry().run(dense_bench(3), Mean(torch.ones(3)), CONFIG)
    undefined = [score for score in result.scores if score.status == "undefined"]
    assert {score.metric for score in undefined} == {"encoder_cosine", "capacity"}
    assert all(score.value is None for score in undefined)
    half = sae(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.eye(2))
    result = Geometry().run(dense_bench(2), half, CONFIG)
    assert values(result, "encoder_cosine") == {0: 1.0, 1: None}
    assert values(result, "capacity") == {0: 1.0, 1: None}
    assert values(result, "alive") == {0: 1.0, 1: 1.0}


def test_capacity_of_orthogonal_and_duplicated_directions():
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q.float()
    bench = dense_bench(6)
    assert list(values(Geometry().run(bench, sae(basis), CONFIG), "capacity").values()) == pytest.approx([1.0] * 6)
    # two the same (of unequal length, one of opposite sign), three the same, one alone
    rows = torch.stack([basis[0], -3 * basis[0], basis[1], basis[1], 0.1 * basis[1], basis[2]])
    found = list(values(Geometry().run(bench, sae(rows), CONFIG), "capacity").values())
    assert found == pytest.approx([1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3, 1], rel=1e-5)


def test_capacity_is_the_published_formula_in_any_blocks(monkeypatch):
    w = torch.randn(17, 5)
    gram = w.double() @ w.double().T
    expected = gram.diagonal().square() / gram.square().sum(1)
    for block in (1, 15, 1 << 24):
        monkeypatch.setattr("evalkit.util.batching.MOST", block)
        assert torch.allclose(similarity.capacity(w), expected, rtol=1e-9)
    assert float(similarity.capacity(similarity.unit_rows(w)).sum()) <= 5 + 1e-6  # capacities share the D dimensions


def planted(features: int, same: int, width: int = 32, noise: float = 0.02) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Directions, a permuted copy of which the first ``same`` are kept up to noise, and where each went."""
    a = unit(features, width, 11)
    b = unit(features, width, 12)
    b[:same] = a[:same] + noise * unit(same, width, 13)
    order = torch.randperm(features, generator=torch.Generator().manual_seed(3))
    return a, b[order], order.argsort()


def test_a_planted_permutation_is_recovered():
    a, b, place = planted(40, 30)
    found = similarity.match_one_to_one(a, b)
    assert found.partners[:30].tolist() == place[:30].tolist()
    assert sorted(found.partners.tolist()) == list(range(40))
    assert found.cosines[:30].min() > 0.99 and found.cosines[30:].max() < 0.9
    bench = dense_bench(32, b=sae(b))
    result = Geometry().run(bench, sae(a), against("b"))
    assert mean(result, "matched") == mean(result, "matched_back") == 30 / 40
    assert values(result, "matched") == {f: float(f < 30) for f in range(40)}
    assert mean(result, "matched_random") == mean(result, "matched_back_random") == 0
    assert mean(Geometry().run(bench, sae(a), against("b", matched_above=0.9999)), "matched") < 30 / 40


def test_mmcs_is_the_plain_maximum_both_ways():
    a, b, _ = planted(10, 4)
    b = b[:7]
    result = Geometry().run(dense_bench(32, b=sae(2 * b)), sae(a), against("b"))
    cosines = a.double() @ (b.double() / b.double().norm(dim=1, keepdim=True)).T
    assert list(values(result, "mmcs").values()) == pytest.approx(cosines.max(1).values.tolist(), abs=1e-6)
    assert list(values(result, "mmcs_back").values()) == pytest.approx(cosines.max(0).values.tolist(), abs=1e-6)
    assert {score.n for score in result.scores if score.metric == "mmcs"} == {7}
    assert len(values(result, "matched")) == 10 and len(values(result, "matched_back")) == 7


def test_one_partner_serves_one_feature():
    # two features lie on one of the other's: MMCS counts both, the matching one of them
    a = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.05, 0.0], [0.0, 0.0, 1.0]])
    b = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    result = Geometry().run(dense_bench(3, b=sae(b)), sae(a), against("b"))
    assert mean(result, "mmcs") > 0.99
    assert values(result, "matched") == {0: 1.0, 1: 0.0, 2: 1.0}


def test_dead_features_take_no_part():
    a, b, _ = planted(6, 6)
    x = a[:4].repeat(N * T // 4, 1).reshape(N, T, 32)
    bench = PlainBench(x, b=sae(b, b_enc=-0.9))
    result = Geometry().run(bench, sae(a, b_enc=-0.9), against("b"))
    assert set(values(result, "mmcs")) == set(values(result, "matched")) == {0, 1, 2, 3}
    assert mean(result, "matched") == 1 and len(values(result, "matched_back")) == 4
    silent = Geometry().run(PlainBench(torch.zeros(N, T, 32), b=sae(b)), sae(a, b_enc=-1.0), against("b"))
    assert [s.status for s in silent.scores if s.metric in ("mmcs", "matched")] == ["undefined", "undefined"]


def test_signed_codes_are_compared_by_absolute_cosine():
    basis = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q.float()
    turned = PCA(-basis, torch.zeros(5), -basis, torch.zeros(5), rectified=False)
    assert turned.signed
    result = Geometry().run(dense_bench(5, turned=turned), sae(basis), against("turned"))
    assert mean(result, "mmcs") == pytest.approx(1) and mean(result, "matched") == 1
    rectified = PCA(-basis, torch.zeros(5), -basis, torch.zeros(5), rectified=True)
    result = Geometry().run(dense_bench(5, turned=rectified), sae(basis), against("turned"))
    assert mean(result, "mmcs") == pytest.approx(0, abs=1e-6) and mean(result, "matched") == 0


@pytest.mark.parametrize(("width", "count", "signed"), [(16, 64, False), (48, 200, True)])
def test_random_directions_give_the_expected_maximum(width, count, signed):
    # the cosine of two random directions: its square is Beta(1/2, (D - 1)/2), so the best of n has the n-th power of its CDF
    square = stats.beta(0.5, (width - 1) / 2)

    def below(t: float) -> float:
        inside = square.cdf(t * t)
        return float(inside if signed else (1 + np.sign(t) * inside) / 2)

    low = 0.0 if signed else -1.0
    expected = 1 - integrate.quad(lambda t: below(t) ** count, low, 1, limit=200)[0]
    rows = unit(count, width, 21)
    draws = PCA(rows, torch.zeros(count), rows, torch.zeros(width), rectified=not signed)
    own = sae(unit(400, width, 22))
    result = Geometry().run(dense_bench(width, draws=draws), own, against("draws"))
    assert mean(result, "mmcs") == pytest.approx(expected, abs=0.01)
    assert mean(result, "mmcs_random") == pytest.approx(expected, abs=0.01)
    assert mean(result, "mmcs_random") != mean(result, "mmcs")


def test_the_null_shares_no_draw_with_dictionaries_of_the_same_seed():
    bench = dense_bench(24)
    start = torch.randn(30, 24, generator=torch.Generator().manual_seed(bench.seed))  # how training and baselines begin
    bench._named["other"] = sae(unit(30, 24, 9))
    result = Geometry().run(bench, sae(start), against("other"))
    assert mean(result, "matched_random") == 0
    assert mean(result, "mmcs_random") < 0.7


def test_rounding_of_weights_is_no_difference():
    # orthonormal up to float32: whatever the basis, all its capacities are the same number
    basis = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64)).Q.float()
    assert set(similarity.capacity(basis).tolist()) != {1.0}
    result = Geometry().run(dense_bench(30), sae(basis), CONFIG)
    assert set(values(result, "capacity").values()) == set(values(result, "encoder_cosine").values()) == {1.0}


def test_many_features_are_drawn_and_their_partners_take_part():
    a, b, _ = planted(300, 240, width=48)
    bench = dense_bench(48, b=sae(b))
    result = Geometry().run(bench, sae(a), against("b", match_features=100))
    drawn = values(result, "matched")
    assert len(drawn) == len(values(result, "matched_back")) == 100
    # a draw of the other side would hold the partner of one in three only
    assert drawn == {f: float(f < 240) for f in drawn}
    assert 60 < sum(drawn) / len(drawn) < 240  # spread over all features, not the first ones
    again = Geometry().run(bench, sae(a), against("b", match_features=100))
    assert again == result
    bench.seed += 1
    assert set(values(Geometry().run(bench, sae(a), against("b", match_features=100)), "matched")) != set(drawn)


def test_partners_of_a_shortlist_are_named_by_their_place_among_all():
    a, b, place = planted(60, 60)
    found = similarity.match_one_to_one(a[:5], b, limit=10)
    assert found.partners.tolist() == place[:5].tolist()
    alone = similarity.match_one_to_one(a[:2], b[place[:1]])
    assert alone.partners.tolist() == [0, -1]
    assert alone.cosines.isnan().tolist() == [False, True]


def test_the_shortlist_takes_nearest_first_and_no_more_than_it_may():
    near = similarity.Nearest(torch.tensor([[0.9, 0.5], [0.8, 0.7], [0.7, 0.1]]), torch.tensor([[4, 1], [4, 2], [3, 0]]))
    assert similarity.shortlist(near, 10).tolist() == [4, 3, 2, 1, 0]
    assert similarity.shortlist(near, 3).tolist() == [4, 3, 2]
    assert similarity.shortlist(near, 1).tolist() == [4]


def test_nearest_in_any_blocks(monkeypatch):
    a, b = unit(9, 4, 1), unit(7, 4, 2)
    whole = similarity.nearest(a, b, absolute=True, count=3)
    monkeypatch.setattr("evalkit.util.batching.MOST", 1)
    rows = similarity.nearest(a, b, absolute=True, count=3)
    assert torch.equal(whole.partners, rows.partners) and torch.allclose(whole.cosines, rows.cosines)
    assert similarity.nearest(a, b, count=99).partners.shape == (9, 7)


def test_a_dictionary_is_not_compared_with_itself_whatever_its_name():
    a = unit(5, D, 1)
    result = Geometry().run(dense_bench(D, copy=sae(a.clone())), sae(a), against("copy"))
    assert {score.metric for score in result.scores} == {"alive", "density", "encoder_cosine", "capacity"}


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(DictionaryError, match="width 5"):
        Geometry().run(dense_bench(D), sae(unit(3, 5, 1)), CONFIG)
    with pytest.raises(DictionaryError, match="width 5"):
        Geometry().run(dense_bench(D, small=sae(unit(3, 5, 1))), sae(unit(3, D, 1)), against("small"))
    with pytest.raises(CorpusError, match="no kept position"):
        Geometry().run(PlainBench(torch.zeros(N, T, D), torch.zeros(N, T, dtype=torch.bool)), sae(unit(3, D, 1)), CONFIG)
    for bad in ({"alive_threshold": -1}, {"matched_above": 0.0}, {"matched_above": 1.0}, {"match_features": 0}):
        with pytest.raises(ValueError):
            GeometryConfig(**bad)


ENTRY = '[[evaluation]]\nname = "geometry"\nalive_threshold = 1\n'


def test_the_suite_names_the_near_miss_of_against(tmp_path):
    with pytest.raises(SuiteError, match="no dictionary called 'nuerons'") as caught:
        load_suite(tiny_suite(tmp_path, extra=ENTRY + 'against = "nuerons"\n'))
    assert caught.value.exit_code == 2
    assert "did you mean 'neurons'?" in caught.value.fix
    assert "geometry" in caught.value.where
    with pytest.raises(SuiteError, match="matched_above = 2"):
        load_suite(tiny_suite(tmp_path, extra=ENTRY + "matched_above = 2\n"))


def keys(folder: Path, suite: Path) -> dict[str, str]:
    """Keys of the geometry units by dictionary."""
    with Workbench(load_suite(suite), folder, Progress(quiet=True)) as bench:
        return {u.dictionary.name: unit_key(u, bench) for u in units(bench.suite, "geometry")}


def test_the_key_follows_the_weights_of_the_dictionary_compared_with(tmp_path):
    def suite(entry: str, rectified: bool = True) -> Path:
        path = tiny_suite(tmp_path, extra=entry)
        if not rectified:
            path.write_text(path.read_text().replace('baseline = "neurons"', 'baseline = "neurons"\nrectified = false'))
        return path

    alone = keys(tmp_path, suite(ENTRY))
    compared = keys(tmp_path, suite(ENTRY + 'against = "neurons"\n'))
    other = keys(tmp_path, suite(ENTRY + 'against = "neurons"\n', rectified=False))
    assert len({alone["SAE"], compared["SAE"], other["SAE"]}) == 3
    assert keys(tmp_path, suite(ENTRY + 'against = "neurons"\n')) == compared
    assert keys(tmp_path, suite(ENTRY, rectified=False))["SAE"] == alone["SAE"]


def test_rows_in_the_results_file(tmp_path):
    extra = f'{ENTRY}against = "neurons"\n{ENTRY}against = "SAE"\n'
    suite, store = tiny_suite(tmp_path, extra=extra), tmp_path / "out" / "evalkit.duckdb"
    outcome = run(suite, store, only="geometry")
    assert (outcome.status, outcome.done) == ("done", 4)
    assert run(suite, store, only="geometry").reused == 4
    with evalkit.open_results(store) as results:
        table = results.table("geometry").set_index(["config", "dictionary", "metric"])
        with_neurons, with_sae = table.loc["against=neurons"], table.loc["against=SAE"]
        mmcs = with_neurons.loc["SAE", "mmcs"]
        assert 0 < mmcs["mean"] <= 1 and mmcs["n"] > 0
        assert mmcs["null_metric"] == "mmcs_random" and 0 < mmcs["null_mean"] < 1
        assert with_neurons.loc["neurons", "mmcs"]["n"] == 0
        assert with_sae.loc["neurons", "mmcs"]["mean"] == pytest.approx(with_neurons.loc["SAE", "mmcs_back"]["mean"])
        assert with_neurons.loc["neurons", "encoder_cosine"]["mean"] == 1
        assert with_neurons.loc["neurons", "capacity"]["mean"] == pytest.approx(1)
        features = results.features("geometry", "density")
        assert list(features.columns)[:3] == ["run", "evaluation", "metric"]
        of_sae = features[(features.dictionary == "SAE") & (features.config.str.contains("neurons"))]
        assert of_sae.feature.tolist() == list(range(64))
        assert of_sae.value.mean() == pytest.approx(with_neurons.loc["SAE", "density"]["mean"])
        count = (
            "SELECT count(*) AS n FROM latest_scores WHERE evaluation = 'geometry' AND metric = 'density' AND kind = 'feature'"
        )
        assert results.sql(count)["n"].iloc[0] == len(features)
        with pytest.raises(evalkit.EvalkitError, match="no feature scores called 'densty'") as caught:
            results.features("geometry", "densty")
        assert "did you mean 'density'?" in str(caught.value)
