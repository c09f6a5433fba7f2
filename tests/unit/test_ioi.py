"""The evaluation 'ioi': planted measurements with known scores, a tiny suite end to end, refusals, keys."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from judge_fakes import tiny_model
from suite_case import tiny_suite

import evalkit
from evalkit.dictionaries.controls import Identity, Mean
from evalkit.dictionaries.topk import TopK
from evalkit.errors import DictionaryError, SuiteError, UnitFailed
from evalkit.evaluations.base import EVALUATIONS, Result, Score
from evalkit.evaluations.ioi import scores as ioi_scores
from evalkit.evaluations.ioi.curves import DRAWS
from evalkit.evaluations.ioi.evaluation import IOI, IOIConfig
from evalkit.evaluations.ioi.measure import MEASURED, Curve, Measured, Ordering, Plan, measure, prompts_of
from evalkit.models.language_model import load_model
from evalkit.patching.patching import Patching, Point
from evalkit.patching.rankings import rank
from evalkit.report import draw
from evalkit.report.tables import paper_table
from evalkit.report.views.ioi import UNPATCHED
from evalkit.runs.plan import unit_key, units
from evalkit.runs.run import run
from evalkit.runs.workbench import Workbench
from evalkit.store.scores import Side, comparison, score_table
from evalkit.suite import load_suite
from evalkit.tasks.base import Average, TaskReport
from evalkit.util.progress import Progress
from evalkit.util.statistics import weighted_mean_interval

HOOK = "blocks.0.hook_resid_post"
SECTION = """
[[evaluation]]
name = "ioi"
task = "jsonl"
path = "pairs.jsonl"
pairs = 8
rankings = ["attribution", "single"]
seeds = 2
top = 3
least_accuracy = 0
"""


def write_pairs(path: Path, count: int = 8) -> Path:
    """Pairs that differ in one digit, which is one token, with a digit as the answer."""
    lines = []
    for n in range(count):
        a, b = str(n % 10), str((n + 3) % 10)
        rest = f" foxes in the rain, {n} dogs in the snow and"
        pair = {"base": f"{a}{rest}", "target": f"{b}{rest}", "base_answer": a, "target_answer": b, "wrong": str((n + 5) % 10)}
        lines.append(json.dumps(pair))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ioi")
    write_pairs(folder / "pairs.jsonl")
    return folder


@pytest.fixture(scope="module")
def model(home):
    return load_model(str(tiny_model(home / "alone")))


class PlainBench:
    """A model and a seed."""

    hook_point = HOOK
    progress = Progress(quiet=True)

    def __init__(self, model, seed: int = 3) -> None:
        self.model, self.seed = model, seed


def config(home: Path, **more: object) -> IOIConfig:
    usual = {"task": "jsonl", "path": str(home / "pairs.jsonl"), "pairs": 8, "rankings": ("attribution",), "seeds": 2, "top": 3}
    return IOIConfig(**{**usual, "least_accuracy": 0.0, **more})  # type: ignore[arg-type]


def a_topk(width: int = 32, features: int = 40, k: int = 6) -> TopK:
    generator = torch.Generator().manual_seed(3)
    W = torch.randn(width, features, generator=generator)
    return TopK({"W_enc": W, "b_enc": torch.zeros(features), "W_dec": 0.2 * W.T.contiguous(), "b_dec": torch.zeros(width)}, k)


def value(result: Result, metric: str) -> float:
    """The metric as the store computes it."""
    rows = [score for score in result.scores if score.metric == metric and score.status == "ok"]
    assert rows, metric
    return sum(score.value * score.weight for score in rows) / sum(score.weight for score in rows)


def planted(ranking: str, seed: int, kl: list[list[float]], left_out: list[float]) -> Ordering:
    """An ordering of four features with given KLs at 0, 1, 2 and 4 of them; the logit difference goes from 2 to -2 with them."""
    at = np.array(kl)
    share = 1 - at / at[:1]
    values = {"kl": at, "kl_reverse": 2 * at, "logit_difference": 2 - 4 * share, "recovered": share, "edit": 3 * share,
              "active": np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [3.0, 1.0]])}  # fmt: skip
    curve = Curve(np.array([0, 1, 2, 4]), values, [None] * 4)
    ends = {key: np.array(left_out) if key == "kl" else value[-1] for key, value in values.items()}
    return Ordering(ranking, seed, [7, 5, 9, 2], [-1.0, -0.5, None, 0.0], curve, None, ends, 6, 4, 12.0, 0.25)


def scored(orderings: list[Ordering], main: str, average: Average) -> list[Score]:
    """Scores of two prompts whose target has a logit difference of -2."""
    unseen = np.array([3.8, 1.9]), np.array([0.4, 0.8])
    found = Measured(orderings, 4, np.array([-2.0, -2.0]), orderings[0].curve.values["kl"][0], 1, *unseen)
    return list(ioi_scores.scores(found, TaskReport(average, average, average), main, 2, 4))


def test_it_is_registered_and_its_first_metrics_are_the_claim():
    assert EVALUATIONS.get("ioi") is IOI
    assert [name for name, metric in IOI.metrics.items() if metric.main] == ["patches_50"]
    assert all(metric.null in ("", *IOI.metrics) for metric in IOI.metrics.values())


def test_planted_measurements_have_the_scores_they_must():
    main = planted("single", 0, [[4.0, 2.0], [3.0, 1.5], [1.0, 0.5], [0.0, 0.0]], [3.0, 1.0])
    chance = planted("random", 0, [[4.0, 2.0], [4.0, 2.0], [3.0, 1.5], [0.0, 0.0]], [0.5, 0.5])
    scores = scored([main, chance], "single", Average(0.5, 2, (1.0, 0.0)))
    result = Result(scores, {})
    assert {score.metric for score in scores} <= set(IOI.metrics)
    # the mean falls from 2.25 at one patch to 0.75 at two: 1.5, a half, is half way on the logarithm
    assert np.exp(value(result, "patches_50")) == pytest.approx(2**0.5)
    assert value(result, "edit_50") == pytest.approx(1.5)
    # 0.75 is exactly a quarter, and beyond it a tenth lies between two and four
    assert np.exp(value(result, "patches_25")) == pytest.approx(2.0)
    assert np.exp(value(result, "patches_10")) == pytest.approx(2 * 2**0.6)
    assert np.exp(value(result, "patches_50_random")) == pytest.approx(2 * 2 ** (1 / 3))
    # trapezoids over log2: (3/4 + 1/4) / 2 and 1/8, halved
    assert value(result, "area") == pytest.approx((0.5 + 0.125) / 2)
    assert value(result, "area_random") == pytest.approx((0.875 + 0.375) / 2)
    assert value(result, "faithfulness") == pytest.approx(0.75) and value(result, "faithfulness_random") == pytest.approx(0.25)
    assert value(result, "completeness") == pytest.approx(4 / 6) and value(result, "completeness_random") == pytest.approx(1 / 6)
    assert value(result, "recovered") == pytest.approx(0.75) and value(result, "recovered_random") == pytest.approx(0.25)
    assert value(result, "kl_unpatched") == 3.0 and value(result, "kl_floor") == 0.0
    assert value(result, "candidates") == 4 and value(result, "passes_single") == 12.0
    assert value(result, "seconds_single") == 0.25 and not [score for score in scores if score.metric == "seconds_random"]
    assert value(result, "accuracy") == 0.5
    assert value(result, "unseen") == 1 and value(result, "unseen_share") == pytest.approx(0.3 / 6)
    assert value(result, "unseen_lost") == pytest.approx(1.2 / 6)
    assert value(result, "missed_50") == 0
    assert value(result, "active_50") == pytest.approx(0.75) and value(result, "active_25") == pytest.approx(1.0)
    # what is left of the logit difference's way is what is left of the KL here, and both prompts are alike
    for metric in ("patches_difference", "patches_median"):
        assert value(result, metric) == pytest.approx(value(result, "patches_50"))
    assert np.exp(value(result, "chance_50")) == pytest.approx(2 ** (1 / 3 + 1 / 2))


def test_the_lowest_kl_is_that_of_the_best_set_and_not_of_each_prompts_own():
    kl = [[4.0, 2.0], [0.0, 1.5], [0.5, 0.5], [1.0, 1.0]]
    scores = scored([planted("single", 5, kl, [3.0, 1.0])], "single", Average(1.0, 2, (1.0, 1.0)))
    lowest = [(score.value, score.item, score.seed) for score in scores if score.metric == "kl_lowest"]
    assert lowest == [(0.5, 0, 5), (0.5, 1, 5)] and value(Result(scores, {}), "kl_floor") == 1.0


def test_the_gap_to_acdc_is_taken_prompt_by_prompt_over_its_seeds():
    fast = planted("acdc-fast", 0, [[4.0, 2.0], [3.0, 1.5], [1.0, 0.5], [0.0, 0.0]], [3.0, 1.0])
    slow = [planted("acdc", s, [[4.0, 2.0], [2.0, 1.0], [2.0 * s, 1.0 * s], [0.0, 0.0]], [3.0, 1.0]) for s in (0, 1)]
    scores = scored([fast, *slow], "acdc-fast", Average(1.0, 2, (1.0, 1.0)))
    result = Result(scores, {})
    assert value(result, "gap_acdc-fast") == pytest.approx(value(result, "area") - value(result, "area_acdc"))
    assert {score.seed for score in scores if score.metric == "area_acdc"} == {0, 1}
    assert {score.metric for score in scores} <= set(IOI.metrics)


UNIT = {"run_id": "r", "evaluation": "ioi", "evaluation_version": IOI.version, "dictionary": "a", "dictionary_id": "a",
        "hook_point": HOOK, "config": "{}", "unit_seed": 0}  # fmt: skip


def described() -> pd.DataFrame:
    """Descriptions of the metrics as the store has them."""
    about = {"evaluation": "ioi", "evaluation_version": IOI.version}
    return pd.DataFrame([
        {**about, "metric": key, "position": i, "title": m.title, "better": m.better, "chance": m.chance,
         "null_metric": m.null or None, "transform": m.transform or None, "has_interval": m.interval, "digits": m.digits,
         "main": m.main, "note": m.note}
        for i, (key, m) in enumerate(IOI.metrics.items())
    ])  # fmt: skip


def compared(metric: str, **sides: list[Score]) -> pd.Series:
    """Row of the store's comparison of two dictionaries, each with its scores, for ``metric``."""
    rows = [
        {**score._asdict(), **UNIT, "dictionary": name, "dictionary_id": name}
        for name, scores in sides.items()
        for score in scores
    ]
    one, two = (Side(name, "r", name, "text") for name in sides)
    return comparison([(one, two)], pd.DataFrame(rows), described()).set_index("metric").loc[metric]


def eight(orderings: list[Ordering], average: Average) -> list[Score]:
    """Scores of eight prompts whose target has a logit difference of -2."""
    n = len(average.values)
    values = orderings[0].curve.values
    orderings = [o._replace(curve=o.curve._replace(values={**values, "active": np.ones_like(values["kl"])})) for o in orderings]
    found = Measured(orderings, 4, np.full(n, -2.0), values["kl"][0], 0, np.ones(n), np.ones(n))
    return list(ioi_scores.scores(found, TaskReport(average, average, average), "single", 2, 4))


def test_crossings_pair_draw_by_draw_and_what_is_not_reached_is_a_bound():
    average, left_out = Average(1.0, 8, (1.0,) * 8), [3.0] * 8
    rng = np.random.default_rng(0)
    spread = rng.lognormal(0.0, 1.0, 8)  # what the two dictionaries share
    early, late, never = (
        [(share * spread).tolist() for share in shares] for shares in ([1, 0.5, 0.2, 0.1], [1, 0.9, 0.6, 0.1], [1, 0.9, 0.9, 0.8])
    )
    one, two, lost = (eight([planted("single", 0, kl, left_out)], average) for kl in (early, late, never))
    (estimate,) = [s for s in one if s.metric == "patches_50" and s.item == 0]
    assert (estimate.kind, estimate.status, estimate.n, estimate.weight) == ("draw", "ok", 8, 1.0)
    assert len([s for s in one if s.metric == "patches_50"]) == 1 + DRAWS
    row = compared("patches_50", a=one, b=two)
    # every draw of either has the same crossing, as all prompts fall alike: the difference is certain
    assert row["paired"] and row["n_a"] == row["clusters"] == 8 and row["p"] < 0.05
    assert row["low"] == pytest.approx(row["difference"]) and row["high"] == pytest.approx(row["difference"])
    (bound,) = [s for s in lost if s.metric == "patches_50" and s.item == 0]
    assert bound.status == "censored" and np.exp(bound.value) == pytest.approx(4.0)
    assert value(Result(lost, {}), "missed_50") == 1
    row = compared("patches_50", a=one, b=lost)
    assert row["low"] == -np.inf and row["high"] == pytest.approx(np.log(1 / 4)) and row["p"] < 0.05
    row = compared("patches_50", a=lost, b=lost)
    assert row["p"] == 1 and np.isnan(row["difference"]) and (row["low"], row["high"]) == (-np.inf, np.inf)


def test_the_table_prints_a_bound_where_half_is_not_reached():
    average = Average(1.0, 8, (1.0,) * 8)
    spread = np.random.default_rng(0).lognormal(0.0, 1.0, 8)
    never = [(share * spread).tolist() for share in (1, 0.9, 0.9, 0.8)]
    rows = [{**score._asdict(), **UNIT} for score in eight([planted("single", 0, never, [3.0] * 8)], average)]
    unit = {**UNIT, "unit_order": 0, "status": "done", "judge": None}
    table = score_table(pd.DataFrame([unit]), pd.DataFrame(rows), described(), {"a": "topk"}).set_index("metric")
    row = table.loc["patches_50"]
    assert (row["mean"], row["low"], row["high"]) == pytest.approx((4.0, 4.0, 4.0)) and row["clusters"] == row["n"] == 8
    assert row["beyond"] == "mean low high" and table.loc["kl_floor", "beyond"] == ""
    text = paper_table(table.reset_index())
    assert ">4.0 [>4.0, >4.0]" in text and "not reached within what was measured" in " ".join(text.split())


def test_seeds_of_one_recipe_have_one_row_with_the_noise_of_both():
    average = Average(1.0, 8, (1.0,) * 8)
    rng = np.random.default_rng(0)
    rows, units = [], []
    for name in ("a", "b"):
        fall = np.array([[1.0] * 8, *(share * rng.uniform(0.5, 1.5, 8) for share in (0.6, 0.3, 0.05))])
        unit = {**UNIT, "dictionary": name, "dictionary_id": name}
        rows += [{**score._asdict(), **unit} for score in eight([planted("single", 0, fall.tolist(), [3.0] * 8)], average)]
        units.append({**unit, "unit_order": 0, "status": "done", "judge": None})
    table = score_table(pd.DataFrame(units), pd.DataFrame(rows), described(), {}, of_family={"a": "f", "b": "f"})
    one, two, both = (row for _, row in table[table["metric"] == "patches_50"].iterrows())
    assert both["seeds"] == 2 and both["clusters"] == 8
    assert np.log(both["mean"]) == pytest.approx((np.log(one["mean"]) + np.log(two["mean"])) / 2)
    assert both["low"] < both["mean"] < both["high"] and both["seed_sd"] > 0


def test_rows_of_a_measurement():
    rows = ioi_scores.tables(
        Measured([planted("single", 3, [[4.0, 1 / 3]] * 4, [0.0, 0.0])], 4, np.zeros(2), np.zeros(2), 0, np.zeros(2), np.zeros(2))
    )
    assert len(rows["patching_curves"]) == 8 and rows["patching_curves"][1]["kl"] == 0.3333333
    assert rows["patching_curves"][-1]["size"] == 4 and rows["patching_curves"][-1]["prompt"] == 1
    ranks = [(row["place"], row["feature"], row["effect"]) for row in rows["feature_ranks"]]
    assert ranks == [(1, 7, -1.0), (2, 5, -0.5), (3, 9, None), (4, 2, 0.0)]
    assert rows["patching_rankings"] == [
        {"ranking": "single", "seed": 3, "prompts": 6, "candidates": 4, "passes": 12.0, "seconds": 0.25}
    ]


def test_an_exact_dictionary_has_no_floor_and_all_features_are_faithful_and_complete(model, home):
    result = IOI().run(PlainBench(model), Identity(torch.eye(32)), config(home, top=32))
    assert value(result, "kl_floor") == pytest.approx(0, abs=1e-6) and value(result, "kl_unpatched") > 1e-3
    assert value(result, "faithfulness") == pytest.approx(1) and value(result, "completeness") == pytest.approx(1)
    assert value(result, "recovered") == pytest.approx(1, abs=1e-4)
    assert value(result, "candidates") == 32 and 1 <= np.exp(value(result, "patches_10")) <= 32


def test_reported_prompts_are_the_items_and_seeds_stand_beside_each_other(model, home):
    result = IOI().run(PlainBench(model), a_topk(), config(home))
    patches = [score for score in result.scores if score.metric == "area_random"]
    assert {(score.kind, score.item, score.seed) for score in patches} == {
        ("prompt", i, s) for i in range(4) for s in range(3, 8)
    }
    assert all(score.weight > 0 for score in patches)
    assert {score.seed for score in result.scores if score.metric == "area"} == {3}
    assert {row["ranking"] for row in result.tables["patching_rankings"]} == {"attribution", "random"}
    sizes = {row["size"] for row in result.tables["patching_curves"]}
    assert {0, 3, len({row["feature"] for row in result.tables["feature_ranks"]})} <= sizes


def test_same_seed_same_rows(model, home):
    first, second = (IOI().run(PlainBench(model), a_topk(), config(home)) for _ in range(2))
    one, two = ([s for s in result.scores if not s.metric.startswith("seconds_")] for result in (first, second))
    assert one == two and len(one) < len(first.scores) and first.tables["patching_curves"] == second.tables["patching_curves"]


def test_features_of_the_reported_half_alone_come_last(model, home):
    result = IOI().run(PlainBench(model), a_topk(), config(home))
    ranks = [row for row in result.tables["feature_ranks"] if row["ranking"] == "attribution"]
    assert [row["place"] for row in ranks] == list(range(1, len(ranks) + 1))
    ranked = {row["ranking"]: row["candidates"] for row in result.tables["patching_rankings"]}["attribution"]
    assert all(row["effect"] is not None for row in ranks[:ranked]) and all(row["effect"] is None for row in ranks[ranked:])
    by_chance = [row for row in result.tables["feature_ranks"] if row["ranking"] == "random" and row["seed"] == 3]
    assert {row["feature"] for row in by_chance} == {row["feature"] for row in ranks}


def test_an_unseen_feature_is_as_likely_in_front_as_any_other_by_chance(model, home):
    result = IOI().run(PlainBench(model), a_topk(features=400, k=2), config(home, seeds=40))
    ranks = [row for row in result.tables["feature_ranks"] if row["ranking"] == "attribution"]
    unseen = {row["feature"] for row in ranks if row["effect"] is None}
    seen = {row["feature"] for row in ranks} - unseen
    places = {side: [] for side in ("unseen", "seen")}
    for row in result.tables["feature_ranks"]:
        if row["ranking"] == "random":
            places["unseen" if row["feature"] in unseen else "seen"].append(row["place"])
    assert unseen and seen
    middle = (1 + len(ranks)) / 2
    for side in places.values():
        assert np.mean(side) == pytest.approx(middle, abs=4 * len(ranks) / np.sqrt(12 * 40 * min(len(unseen), len(seen))))
    first = [row["feature"] for row in ranks if row["effect"] is None]
    assert first != sorted(first)  # and among themselves in no order of their numbers


def test_the_same_prompts_stand_beside_and_are_the_headline_of_parity(model, home):
    """Ranked and reported on the same prompts, a dictionary has one number, whichever way it is asked for."""
    plain = IOI().run(PlainBench(model), Identity(torch.eye(32)), config(home))
    assert {"patches_50_parity", "patches_50_parity_random", "chance_50_parity"} <= {s.metric for s in plain.scores}
    assert not [s for s in plain.scores if s.metric.startswith("patches_50_names")]  # pairs of a file have no such arm
    prompts = prompts_of(PlainBench(model), "jsonl", 8, {"path": str(home / "pairs.jsonl")}, split=True)
    points, plan = [Point(HOOK, Identity(torch.eye(32)))], Plan(("attribution", "random"), 2, 3, True)
    alone = measure(PlainBench(model), points, prompts._replace(shown=prompts.ranked), plan)
    beside = measure(PlainBench(model), points, prompts, plan)
    own, there = alone.of("attribution")[0].curve, beside.beside["parity"].orderings[0].curve
    assert np.array_equal(own.sizes, there.sizes) and own.values["kl"] == pytest.approx(there.values["kl"])
    assert not alone.beside


def test_features_active_on_a_prompt_are_counted(model, home):
    prompts = prompts_of(PlainBench(model), "jsonl", 8, {"path": str(home / "pairs.jsonl")}, split=True)
    dictionary = a_topk(features=400, k=2)
    found = measure(PlainBench(model), [Point(HOOK, dictionary)], prompts, Plan(("largest-edit", "random"), 1, 3, True))
    shown = Patching(model, [Point(HOOK, dictionary)], prompts.shown)
    for ordering in found.orderings:
        active = ordering.curve.values["active"]
        assert active[0].tolist() == [0.0] * shown.n and active[-1].tolist() == shown.affected.sum(1).tolist()
        assert (active <= ordering.curve.sizes[:, None]).all() and (np.diff(active, axis=0) >= 0).all()
    assert (found.orderings[0].curve.values["edit"][-1] > 0).all()


def test_a_dictionary_whose_codes_never_differ_has_the_unpatched_kl_as_its_floor(model, home):
    result = IOI().run(PlainBench(model), Mean(torch.zeros(32)), config(home))
    assert value(result, "kl_floor") == value(result, "kl_unpatched") and value(result, "area") == pytest.approx(1)
    undefined = {score.metric for score in result.scores if score.status == "undefined"}
    assert {"patches_50", "faithfulness"} <= undefined and result.tables["feature_ranks"] == []


def test_halves_share_no_text_even_where_pairs_repeat(model, tmp_path):
    path = write_pairs(tmp_path / "pairs.jsonl", 12)
    path.write_text(path.read_text() * 2)
    prompts = prompts_of(PlainBench(model), "jsonl", 24, {"path": str(path)}, split=True)
    ranked, shown = set(prompts.ranked.texts), set(prompts.shown.texts)
    assert len(ranked) == len(shown) == 6 and not ranked & shown
    assert len(prompts.ranked.texts) == len(prompts.shown.texts) == 12 and prompts.report.accuracy.n == 24
    both = prompts_of(PlainBench(model), "jsonl", 24, {"path": str(path)}, split=False)
    assert both.ranked is both.shown and len(both.shown.texts) == 24


def test_pairs_with_either_text_in_common_stand_in_one_half(model, tmp_path):
    rest = " foxes in the rain, dogs in the snow and"
    # 0, 1 and 2 hang together through the 1, and so on; the base of one pair is the target of another, or both have one base
    chains = [("0", "1"), ("1", "2"), ("4", "3"), ("4", "5"), ("6", "7"), ("8", "7"), ("9", "a")]
    lines = [{"base": x + rest, "target": y + rest, "base_answer": x, "target_answer": y} for x, y in chains]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for seed in range(4):
        prompts = prompts_of(PlainBench(model, seed), "jsonl", len(lines), {"path": str(path)}, split=True)
        ranked, shown = ({text for pair in part.texts for text in pair} for part in (prompts.ranked, prompts.shown))
        assert ranked and shown and not ranked & shown
        assert prompts.ranked.n + prompts.shown.n == len(lines) and 0 <= prompts.ranked.n - prompts.shown.n <= 1
    chain = [{**lines[0], "target": f"{n}{rest}", "target_answer": str(n)} for n in range(1, 6)]  # all have one base
    path.write_text("".join(json.dumps(line) + "\n" for line in chain))
    with pytest.raises(UnitFailed, match="5 pairs that all share their texts"):
        prompts_of(PlainBench(model), "jsonl", 5, {"path": str(path)}, split=True)


def test_a_prompt_longer_than_the_model_reads_is_named(model, tmp_path):
    path = write_pairs(tmp_path / "pairs.jsonl", 4)
    long = " and the dogs" * model.context
    with path.open("a") as file:
        for a, b in (("5", "6"), ("7", "8")):
            pair = {"base": a + long, "target": b + long, "base_answer": a, "target_answer": b}
            file.write("\n" + json.dumps(pair) + "\n")
    with pytest.raises(
        UnitFailed, match=rf"2 of 6 pairs have more tokens than the {model.context:,}.*line 6: \d+, line 8: "
    ) as caught:
        prompts_of(PlainBench(model), "jsonl", 9, {"path": str(path)}, split=True)
    assert caught.value.where == f"{path}, line 6"


def test_other_contents_of_the_file_are_other_prompts(model, tmp_path):
    path = write_pairs(tmp_path / "pairs.jsonl", 4)
    before = prompts_of(PlainBench(model), "jsonl", 4, {"path": str(path)}, split=False)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:3]) + "\n")
    assert len(prompts_of(PlainBench(model), "jsonl", 4, {"path": str(path)}, split=False).shown.texts) == 3
    assert len(before.shown.texts) == 4


def test_a_model_that_cannot_do_the_task_is_refused_with_the_numbers(model, home):
    with pytest.raises(UnitFailed) as caught:
        IOI().run(PlainBench(model), a_topk(), config(home, least_accuracy=1.0))
    text = str(caught.value)
    assert "cannot do the task 'jsonl'" in text and "accuracy 0." in text and "8 base prompts" in text
    assert "greater_than" in caught.value.fix and "least_accuracy" in caught.value.fix


def test_what_cannot_be_measured_is_one_message(model, home, tmp_path):
    with pytest.raises(DictionaryError, match="width 16"):
        IOI().run(PlainBench(model), a_topk(16), config(home))
    path = write_pairs(tmp_path / "pairs.jsonl", 1)
    with pytest.raises(UnitFailed, match="cannot be split"):
        IOI().run(PlainBench(model), a_topk(), config(home, path=str(path)))
    with pytest.raises(UnitFailed, match="single tokens"):  # the tiny tokenizer has no names
        IOI().run(PlainBench(model), a_topk(), config(home, task="ioi", path=""))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"pairs": 1}, "pairs = 1"),
        ({"seeds": 0}, "seeds = 0"),
        ({"top": 0}, "top = 0"),
        ({"area_to": 1}, "area_to = 1"),
        ({"rankings": ()}, "at least one"),
        ({"rankings": ("single", "single")}, "none twice"),
        ({"rankings": ("random", "single")}, "null"),
        ({"least_accuracy": 1.5}, "1.5"),
        ({"path": "pairs.jsonl"}, "jsonl"),
        ({"task": "jsonl"}, "jsonl"),
        ({"rankings": ("acdc", "single"), "acdc_most": 9}, "another one first"),
        ({"acdc_most": -1}, "acdc_most"),
        ({"together": ("a", "a")}, "twice"),
    ],
)
def test_impossible_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        IOIConfig(**settings)
    assert IOIConfig(pairs=1, paper_parity=True).pairs == 1


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"task": "iou"}, "did you mean 'ioi'"),
        ({"rankings": ("acdc-fats",)}, "did you mean 'acdc-fast'"),
        ({"task": "greater_than", "counterfactual": "abc"}, "no 'counterfactual'"),
        ({"task": "ioi", "distractor": "same"}, "no 'distractor'"),
        ({"task": "agreement", "orders": ("abba",)}, "no 'orders'"),
        ({"task": "jsonl", "path": "nowhere.jsonl"}, "no such file"),
        ({"settings": ("acdc-fats.points=4",)}, "did you mean 'acdc-fast'"),
        ({"settings": ("acdc.count=4",)}, "'acdc' is not one of rankings"),
        ({"settings": ("acdc-fast.point=4",)}, "did you mean 'points'"),
        ({"settings": ("acdc-fast.seed=4",)}, "no setting 'seed'"),
        ({"settings": ("attribution.points=4",)}, "leave it out"),
        ({"settings": ("acdc-fast.points=4.5",)}, "'4.5' is no whole number"),
        ({"settings": ("acdc-fast.keep=nan",)}, "'nan' is no number"),
        ({"settings": ("acdc-fast.points",)}, "sets nothing"),
        ({"settings": ("acdc-fast.points=2", "acdc-fast.points=4")}, "set twice"),
    ],
)
def test_names_that_do_not_exist_are_refused_before_anything_runs(settings, words):
    with pytest.raises(SuiteError) as caught:
        IOI().check(IOIConfig(**settings), 128)
    assert words in str(caught.value)


def test_the_sets_that_acdc_accepts_are_measured_on_the_reported_prompts(model, home):
    settings = config(home, rankings=("acdc",), settings=("acdc.count=4", "acdc.low=-3"), seeds=1)
    bench, dictionary = PlainBench(model), a_topk(features=80)
    result = IOI().run(bench, dictionary, settings)
    prompts = prompts_of(bench, "jsonl", 8, settings.task_settings, split=True)
    ranked, shown = (
        Patching(model, [Point(HOOK, dictionary)], part, keep_error=True) for part in (prompts.ranked, prompts.shown)
    )
    groups = rank("acdc", ranked, seed=bench.seed, count=4, low=-3.0).groups
    accepted = [row for row in result.tables["patching_curves"] if row["threshold"] is not None]
    assert {row["ranking"] for row in accepted} == {"acdc"} and len(accepted) == len(groups.sets) * shown.n
    kinds = set()
    for threshold, chosen in zip(groups.thresholds.tolist(), groups.sets, strict=True):
        features = ranked.ids[chosen]
        rows = [row for row in accepted if row["threshold"] == threshold]
        assert [row["prompt"] for row in rows] == list(range(shown.n)) and {row["size"] for row in rows} == {len(features)}
        measures = shown.measure(torch.isin(shown.ids, features)[None])
        for key in MEASURED:
            assert [row[key] for row in rows] == pytest.approx(getattr(measures, key)[0].tolist(), rel=1e-5, abs=1e-6)
        kinds.add(len(features))
    assert len(kinds) > 1  # thresholds that differ
    features = {row["feature"] for row in result.tables["feature_ranks"] if row["effect"] is None}
    unseen = torch.tensor([feature in features for feature in shown.ids.tolist()])
    found = measure(bench, [Point(HOOK, dictionary)], prompts, Plan(("attribution",), 1, 3, True))
    assert found.unseen == int(unseen.sum()) > 0
    both = shown.measure(torch.stack([unseen, ~unseen])).kl.numpy()
    assert found.unseen_kl == pytest.approx(both[0]) and found.seen_kl == pytest.approx(both[1])


def test_settings_of_an_ordering_reach_it(model, home):
    plain, more = (
        IOI().run(PlainBench(model), a_topk(), config(home, rankings=("integrated-gradients",), settings=settings))
        for settings in ((), ("integrated-gradients.points = 4",))
    )
    passes = [value(result, "passes_integrated-gradients") for result in (plain, more)]
    assert passes == [4 * (2 + 3 * 10), 4 * (2 + 3 * 4)]
    settings = ("acdc-fast.keep=0.5", "acdc.count=3", "acdc.low=-2")
    both = config(home, rankings=("acdc-fast", "acdc"), settings=settings, seeds=1)
    IOI().check(both, 128)
    curves = IOI().run(PlainBench(model), a_topk(), both).tables["patching_curves"]
    thresholds = {row["threshold"] for row in curves}
    assert {None, 0.01, 0.1} <= thresholds <= {None, 0.01, 0.1, 1.0}  # the last only where something is left to remove
    with pytest.raises(UnitFailed, match="acdc-fast: .*out of range"):
        IOI().run(PlainBench(model), a_topk(), config(home, rankings=("acdc-fast",), settings=("acdc-fast.keep=2",)))


@pytest.fixture(scope="module")
def finished(home):
    """A tiny suite, run: its file and its results."""
    suite = tiny_suite(home, extra=SECTION)
    store = home / "out" / "evalkit.duckdb"
    outcome = run(suite, store)
    assert (outcome.status, outcome.exit_code) == ("done", 0), outcome.message
    return suite, store


def test_a_suite_gives_the_table_with_intervals_and_prompts_that_pair(finished):
    _, store = finished
    with evalkit.open_results(store) as results:
        table = results.table("ioi").set_index(["dictionary", "metric"])
        assert table.loc[("SAE", "area"), "n"] == 4 and table.loc[("SAE", "area_random"), "n"] == 4 * 5
        row = table.loc[("neurons", "area")]
        # four prompts are too few for an interval
        assert np.isnan(row["low"]) and row["no_interval"] == "fewer than 6 independent groups" and row["clusters"] == 4
        assert row["null_mean"] == table.loc[("neurons", "area_random"), "mean"]
        assert table.loc[("SAE", "kl_unpatched"), "mean"] == table.loc[("neurons", "kl_unpatched"), "mean"]
        compared = results.compare("SAE", "neurons", "ioi").set_index("metric")
        assert compared.loc["area", "paired"] and compared.loc["area", "n_a"] == 4
        expected = table.loc[("SAE", "area"), "mean"] - table.loc[("neurons", "area"), "mean"]
        assert compared.loc["area", "difference"] == pytest.approx(expected)


def test_curves_and_ranks_lie_in_tables_of_their_own(finished):
    _, store = finished
    with evalkit.open_results(store) as results:
        curves = results.rows("patching_curves", "ioi")
        assert set(curves["dictionary"]) == {"SAE", "neurons"} and set(curves["ranking"]) == {"attribution", "single", "random"}
        empty = curves[(curves["size"] == 0) & (curves["ranking"] == "attribution") & (curves["dictionary"] == "SAE")]
        table = results.table("ioi").set_index(["dictionary", "metric"])
        assert empty["kl"].mean() == pytest.approx(table.loc[("SAE", "kl_unpatched"), "mean"], rel=1e-6)
        assert (empty["edit"] == 0).all() and (empty["recovered"].abs() < 1e-6).all()
        costs = results.rows("patching_rankings", "ioi")
        assert (costs["prompts"] == 4).all() and (costs[costs["ranking"] == "single"]["passes"] > 0).all()
        named = results.sql("SELECT * FROM ranked_features WHERE dictionary = 'SAE' AND ranking = 'attribution'")
        assert len(named) == named["feature"].nunique() > 0
        by_judge = "SELECT x.feature, x.explanation FROM explanations x JOIN units u ON u.unit_key = x.unit_key "
        # the suite's judge, not the reference beside it
        by_judge += "WHERE u.judge = x.judge AND u.dictionary = 'SAE' AND x.status = 'ok'"
        of_sae = results.sql(by_judge).set_index("feature")["explanation"]
        both = named[named["feature"].isin(of_sae.index)]
        assert of_sae.index.is_unique and len(both) and (both["explanation"] == both["feature"].map(of_sae)).all()
        assert named[~named["feature"].isin(of_sae.index)]["explanation"].isna().all()


def test_the_figure_can_be_drawn_from_the_results(finished, tmp_path):
    _, store = finished
    with evalkit.open_results(store) as results:
        frame, table = results.rows("patching_curves", "ioi"), results.table("ioi")
        found = results.own(UNPATCHED, {"run": frame["run"].iloc[0], "evaluation": "ioi"})
        given = {(hook, config): kl for hook, config, kl in found.itertuples(index=False)}
        draw.draw(results, "ioi", tmp_path / "ioi.png")
    assert set(given) == set(zip(frame["hook_point"], frame["config"], strict=True))
    expected = table[table["metric"] == "kl_unpatched"]["mean"].iloc[0]
    assert list(given.values()) == [pytest.approx(expected)]
    assert (tmp_path / "ioi.png").stat().st_size > 10_000


def test_a_second_run_does_nothing_and_other_settings_or_pairs_are_measured_anew(finished, home, tmp_path):
    suite, store = finished
    again = run(suite, store, only="ioi")
    assert (again.done, again.reused) == (0, 2)
    with Workbench(load_suite(suite), store.parent, Progress(quiet=True)) as bench:
        unit = units(bench.suite, "ioi")[0]
        settings = unit.evaluation.settings
        key = unit_key(unit, bench)

        def of(**more: object) -> str:
            changed = unit.evaluation.__class__("ioi", dataclasses.replace(settings, **more))
            return unit_key(unit._replace(evaluation=changed), bench)

        assert (
            of() == key
            and len({key, of(top=4), of(paper_parity=True), of(rankings=("single",)), of(settings=("single.x=1",))}) == 5
        )
        other = write_pairs(tmp_path / "pairs.jsonl", 7)
        assert of(path=str(other)) != key
        before = of(path=str(other))
        write_pairs(other, 6)
        assert of(path=str(other)) != before


def test_a_refused_task_fails_its_units_and_the_run_says_how_to_go_on(home, tmp_path):
    suite = tiny_suite(home, extra=SECTION.replace("least_accuracy = 0", "least_accuracy = 1.0"))
    store = tmp_path / "evalkit.duckdb"
    outcome = run(suite, store, only="ioi")
    assert (outcome.exit_code, outcome.failed) == (4, 2)
    with evalkit.open_results(store) as results:
        errors = results.failures()["error"]
        assert errors.str.contains("accuracy 0.").all() and errors.str.contains("another task").all()


def item_scores(numerators: list[float], denominators: list[float]) -> list[Score]:
    return list(ioi_scores._ratio("faithfulness", np.array(numerators), np.array(denominators)))


def test_a_ratio_counts_prompts_that_patching_everything_hurts():
    numerators, denominators = [2.0, 1.0, 0.5, 1.5] * 24, [4.0, 3.0, -0.5, 2.0] * 24
    result = Result(item_scores(numerators, denominators), {})
    assert value(result, "faithfulness") == pytest.approx(sum(numerators) / sum(denominators))
    drawn = []
    for index in np.random.default_rng(1).integers(0, 96, (2000, 96)):
        drawn.append(np.array(numerators)[index].sum() / np.array(denominators)[index].sum())
    interval = weighted_mean_interval([score.value for score in result.scores], [score.weight for score in result.scores])
    assert interval.low == pytest.approx(np.quantile(drawn, 0.025), abs=0.05)
    assert interval.high == pytest.approx(np.quantile(drawn, 0.975), abs=0.05)


def test_a_ratio_of_what_may_be_nothing_is_undefined():
    assert {score.status for score in item_scores([1.0, 1.0, 1.0, 1.0], [1.0, -1.0, 0.5, -0.4])} == {"undefined"}
    assert {score.status for score in item_scores([1.0, 1.0], [0.0, 0.0])} == {"undefined"}
    positive = item_scores([1.0, 3.0], [2.0, 4.0])
    assert [(score.value, score.weight) for score in positive] == [(0.5, 2.0), (0.75, 4.0)]


def test_without_the_error_term_the_shares_are_still_of_the_models_own_kl(model, home):
    kept, removed = (IOI().run(PlainBench(model), a_topk(), config(home, keep_error=keep)) for keep in (True, False))
    assert value(kept, "kl_unpatched") == value(removed, "kl_unpatched")
    assert not [score for score in kept.scores if score.metric == "kl_nothing"]
    assert value(removed, "kl_nothing") != pytest.approx(value(removed, "kl_unpatched"), rel=0.01)
    other = TopK({name: tensor.clone() for name, tensor in a_topk().tensors().items()}, 3)
    assert value(IOI().run(PlainBench(model), other, config(home, keep_error=False)), "kl_unpatched") == value(
        kept, "kl_unpatched"
    )


def test_acdc_is_left_out_where_it_is_too_dear(model, home):
    few = IOI().run(PlainBench(model), a_topk(), config(home, rankings=("attribution", "acdc"), acdc_most=2))
    missing = [score.metric for score in few.scores if score.status == "undefined" and score.kind == "dictionary"]
    assert sorted(missing) == ["area_acdc", "gap_attribution", "passes_acdc", "seconds_acdc"]
    assert "acdc" not in {row["ranking"] for row in few.tables["patching_rankings"]}


def test_costs_hold_the_set_up_and_do_not_hang_on_what_was_measured_before(model, home):
    alone = IOI().run(PlainBench(model), a_topk(), config(home, rankings=("single",)))
    behind = IOI().run(PlainBench(model), a_topk(), config(home, rankings=("attribution", "single")))
    assert value(alone, "passes_single") == value(behind, "passes_single")
    rows = {row["ranking"]: row for row in behind.tables["patching_rankings"]}
    assert rows["attribution"]["passes"] == 4 * (2 + 3) and rows["random"]["passes"] == 4 * 2
    assert all(row["seconds"] > 0 for row in rows.values())


def test_features_of_the_reported_half_alone_are_counted_and_patched_alone(model, home):
    result = IOI().run(PlainBench(model), a_topk(features=400, k=2), config(home))
    ranks = [row for row in result.tables["feature_ranks"] if row["ranking"] == "attribution"]
    assert value(result, "unseen") == sum(row["effect"] is None for row in ranks) > 0
    assert {score.kind for score in result.scores if score.metric == "unseen_lost"} == {"prompt"}
    parity = IOI().run(PlainBench(model), Identity(torch.eye(32)), config(home, paper_parity=True))
    assert value(parity, "unseen") == 0 and value(parity, "unseen_share") == value(parity, "unseen_lost") == pytest.approx(0)


class TwoPoints(PlainBench):
    """Two hook points, with an exact dictionary at each."""

    name = "exact"

    def at(self, hook_point: str):
        return self

    def dictionary(self, name: str):
        return Identity(torch.eye(32))


def test_two_hook_points_are_patched_together(model, home):
    later = "blocks.1.hook_resid_mid"
    settings = config(home, together=(HOOK, later), rankings=("attribution",), top=64)
    assert IOI().reaches(settings, HOOK, [HOOK, later]) == [later]
    result = IOI().run(TwoPoints(model), Identity(torch.eye(32)), settings)
    assert value(result, "kl_floor") == pytest.approx(0, abs=1e-6)
    features = {row["feature"] for row in result.tables["feature_ranks"]}
    assert min(features) < 32 <= max(features) < 64
    with pytest.raises(SuiteError, match="hook_resid_mid") as caught:
        IOI().reaches(settings, HOOK, [HOOK, "blocks.1.hook_resid_mib"])
    assert "blocks.1.hook_resid_mib" in caught.value.fix


def test_tables_of_edits_say_the_fvu_of_their_run(finished):
    _, store = finished
    with evalkit.open_results(store) as results:
        fvu = results.table("reconstruction")
        fvu = fvu[fvu["metric"] == "fvu"].set_index("dictionary")["mean"]
        (note,) = [note for note in results.table("ioi").attrs["notes"] if note.startswith("FVU")]
        assert all(f"{name} {value:.3f}" in note for name, value in fvu.items()) and len(fvu) == 2
        assert not [note for note in results.table("reconstruction").attrs["notes"] if note.startswith("FVU")]
