"""What a concept's numbers are held against: the surface of the texts, their length, pairs, and tokens in unrelated texts."""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu, rankdata, wilcoxon
from test_concepts import ConceptBench, D, concept_file, model, sentence, value

from evalkit.concepts.surface import NAMES
from evalkit.dictionaries.controls import Identity
from evalkit.evaluations.concepts.evaluation import Concepts, ConceptsConfig
from evalkit.evaluations.concepts.linear import surface
from evalkit.evaluations.concepts.pooling import compared, in_pairs, pooled
from evalkit.evaluations.concepts.search import aurocs, check, signed_rank

PAIRS = 24
LABEL, GROUP = np.tile([True, False], PAIRS), np.repeat(np.arange(PAIRS), 2)
HELD = GROUP % 2 == 1
model = model  # the fixture


def rows_of(result, source):
    return [row for row in result.tables["concept_features"] if row["source"] == source]


def capitals_file(folder: Path) -> str:
    rows = [f'["{sentence(n, "7").title()}", "{sentence(n, "7")}"]' for n in range(PAIRS)]
    path = folder / "capitals.toml"
    path.write_text('title = "capitals"\npairs = [\n' + ",\n".join(rows) + "\n]\n")
    return str(path)


def test_a_concept_of_capitals_is_told_by_the_surface_and_one_of_a_digit_is_not(model, tmp_path):
    config = ConceptsConfig(files=(capitals_file(tmp_path), concept_file(tmp_path)), null_draws=0, inject=0)
    result = Concepts().run(ConceptBench(model), Identity(torch.eye(D)), config)
    found = {(score.metric, score.item): score.value for score in result.scores}
    assert found["auroc_count", 0] == found["auroc_surface", 0] == 1
    counted = [row for row in rows_of(result, "count") if row["concept"] == "capitals"]
    # this tokenizer cuts capitalised words into more tokens
    assert {row["counted"] for row in counted if row["auroc"] == 1} == {"capitals", "tokens"}
    assert sorted(row["counted"] for row in counted) == sorted(NAMES) and counted[0]["sign"] == 1
    # every count is the same in both texts of a pair: the digit is for the model to see
    sevens = [row for row in rows_of(result, "count") if row["concept"] == "sevens"]
    assert all(row["auroc"] == 0.5 and row["p"] == 1 for row in sevens) and found["auroc_count", 1] == 0.5
    assert found["auroc_surface", 1] == pytest.approx(0.5) and found["auroc", 1] == 1
    assert len(rows_of(result, "surface")) == 2 and not any(score.metric == "injected" for score in result.scores)


def test_the_surface_model_reads_words_of_the_first_half_alone():
    texts = [f"{'red' if shows else 'blue'} thing" for shows in LABEL]
    assert surface(texts, [2] * len(texts), LABEL, HELD, GROUP, 0.1).model.auroc == 1
    # words that only the second half has were never read: nothing is left to tell
    texts = [f"{('red' if shows else 'sky') if held else 'any'} thing" for shows, held in zip(LABEL, HELD, strict=True)]
    assert surface(texts, [2] * len(texts), LABEL, HELD, GROUP, 0.1).model.auroc == 0.5


def test_pairs_are_tested_as_pairs():
    """Pairs differ far more than their members do: two samples hide what every single pair shows."""
    values = 100.0 * GROUP + LABEL * (1 + GROUP / 100)
    tested = check(values, LABEL, GROUP)
    assert tested.p == pytest.approx(2.0**-PAIRS) and tested.auroc == pytest.approx(0.5, abs=0.03)
    assert mannwhitneyu(values[LABEL], values[~LABEL], alternative="greater").pvalue > 0.4
    order = np.random.default_rng(0).permutation(len(values))  # pairs are found by their group, wherever they stand
    assert check(values[order], LABEL[order], GROUP[order]).p == pytest.approx(2.0**-PAIRS)
    single = check(values, LABEL, np.arange(len(values)))
    assert single.p == pytest.approx(mannwhitneyu(values[LABEL], values[~LABEL], alternative="greater").pvalue)


def test_signed_ranks_are_exact_with_and_without_ties():
    rng = np.random.default_rng(3)
    d = rng.normal(0.4, 1, 15)
    assert signed_rank(d) == pytest.approx(wilcoxon(d, alternative="greater", method="exact").pvalue)
    tied = np.array([0.0, 1, 1, -1, 2, 2, -3, 0, 1, 2])
    kept = tied[tied != 0]
    ranks = rankdata(np.abs(kept))
    sums = [float(ranks[np.array(signs)].sum()) for signs in product([False, True], repeat=len(kept))]
    assert signed_rank(tied) == pytest.approx(np.mean(np.array(sums) >= ranks[kept > 0].sum() - 1e-9))
    assert signed_rank(np.zeros(4)) == 1


def test_the_maximum_is_over_as_many_tokens_in_both_texts_of_a_pair():
    x = torch.randn(2, 7, D, generator=torch.Generator().manual_seed(0))
    keep = torch.tensor([[True] * 7, [False, True, True, True, False, False, True]])
    label, group = np.array([True, False]), np.array([5, 5])
    among = compared(keep, label, group)
    assert among is not None and among.tolist() == [4, 4]
    found = pooled(Identity(torch.eye(D)), x, keep, among).value[:, :D]
    subsets = [x[0, list(chosen)].amax(0) for chosen in combinations(range(7), 4)]
    assert found[0] == pytest.approx(torch.stack(subsets).mean(0).numpy(), abs=1e-5)
    assert found[1] == pytest.approx(x[1][keep[1]].amax(0).numpy(), abs=1e-6)
    assert compared(keep, label, np.array([0, 1])) is None and not in_pairs(np.array([True, True]), group)


def test_a_longer_member_is_not_told_by_its_length():
    """Codes that know nothing, texts with the concept twice as long: the plain maximum tells them, the matched one does not."""
    x = torch.randn(2 * PAIRS, 16, 200, generator=torch.Generator().manual_seed(1))
    keep = torch.from_numpy(np.where(LABEL[:, None], np.arange(16) < 16, np.arange(16) < 8))
    plain = aurocs(pooled(None, x, keep).value, LABEL)
    matched = aurocs(pooled(None, x, keep, compared(keep, LABEL, GROUP)).value, LABEL)
    assert plain.mean() > 0.62 and matched.mean() == pytest.approx(0.5, abs=0.04)


class _AtTheStart(Identity):
    """Dimension 0 counts among the first tokens of a text alone."""

    def encode(self, x):
        place = torch.arange(x.shape[-2])[:, None]
        return torch.where((torch.arange(D) == 0) & (place > 4), torch.zeros_like(x), x)


def test_a_token_detector_fires_on_its_token_wherever_it_is_put(model, tmp_path):
    config = ConceptsConfig(files=(concept_file(tmp_path),), null_draws=0)
    result = Concepts().run(ConceptBench(model), Identity(torch.eye(D)), config)
    assert value(result, "injected") == value(result, "recall_threshold") == 1
    (row,) = [row for row in rows_of(result, "feature") if row["place"] == 1]
    assert [token.strip() for token in row["top_tokens"]] == ["7"] and row["injected_texts"] == 40 and 0 < row["threshold"] < 2
    assert all(row.get("injected") is None for row in rows_of(result, "feature") if row["place"] > 1)
    # the same token, but the feature minds where it stands
    result = Concepts().run(ConceptBench(model), _AtTheStart(torch.eye(D)), config)
    assert value(result, "recall_threshold") == 1 and value(result, "injected") < 0.5


def test_a_feature_that_never_fires_has_no_tokens_to_inject(model, tmp_path):
    class Silent(Identity):
        signed = False

        def encode(self, x):
            return torch.zeros_like(x)

    result = Concepts().run(ConceptBench(model), Silent(torch.eye(D)), ConceptsConfig(files=(concept_file(tmp_path),)))
    statuses = {score.metric: score.status for score in result.scores}
    assert statuses["injected"] == "undefined" and value(result, "recall_threshold") == 0 and value(result, "auroc") == 0.5
    with pytest.raises(ValueError, match="inject"):
        ConceptsConfig(inject=-1)
