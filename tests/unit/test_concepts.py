"""Concept search: planted features are found, chance stays chance, halves stay apart, labels from pairs, words and a judge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from judge_fakes import tiny_model
from patching_case import small_topk
from sklearn.metrics import roc_auc_score

from evalkit.activations.capture import Activations
from evalkit.concepts.loading import load_concept, packaged
from evalkit.dictionaries.controls import Identity
from evalkit.dictionaries.topk import TopK
from evalkit.errors import CorpusError, JudgeSetupError, ModelError, SuiteError, UnitFailed
from evalkit.evaluations.concepts import pooling as concept_pooling
from evalkit.evaluations.concepts import search as concept_search
from evalkit.evaluations.concepts.evaluation import Concepts, ConceptsConfig
from evalkit.evaluations.concepts.texts import read_texts
from evalkit.judges.scripted import ScriptedJudge
from evalkit.models.language_model import LanguageModel
from evalkit.models.loading import ModelConfig
from evalkit.text.words import word_pattern
from evalkit.util.progress import Progress
from evalkit.util.statistics import holm

HOOK, D = "blocks.0.hook_resid_post", 32
WORDS = ["rain", "snow", "storms", "because", "since", "the", "fox", "dog"]


class ConceptBench:
    """The tiny model; its blocks do nothing, and dimension 0 is written by the digit 7 alone."""

    references, seed, hook_point, name, hook_points = {}, 3, HOOK, "exact", (HOOK,)
    progress = Progress(quiet=True)

    def __init__(self, model, judge=None):
        self.model, self.judge = model, judge
        texts = [sentence(number, "7" if number % 3 == 0 else "4") for number in range(60)]
        rows = [model.tokenise("\n" + text) for text in texts]
        T = min(map(len, rows))
        tokens = torch.tensor([row[:T] for row in rows])
        keep = torch.ones(len(rows), T, dtype=torch.bool)
        keep[:, 0] = False
        self.activations = Activations(model.activations(tokens, HOOK), keep, tokens, torch.arange(len(rows)), "text", 1e9)

    def score(self):
        return self.activations


def sentence(number: int, digit: str) -> str:
    drawn = np.random.default_rng(number).permutation(WORDS)
    return f"{drawn[0]} {digit} {' '.join(drawn[1:6])}"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LanguageModel:
    model = LanguageModel.load(ModelConfig(path=str(tiny_model(tmp_path_factory.mktemp("m") / "m"))), Progress(quiet=True))
    seven = model.tokenise(" 7")[-1]
    with torch.no_grad():
        for name, weight in model._bridge.original_model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()
            if "embed_tokens" in name:
                weight[:, 0] = 0
                weight[seven, 0] = 2.0
    return model


def concept_file(folder: Path, pairs: int = 24, more: str = "") -> str:
    rows = [f'["{sentence(n, "7")}", "{sentence(n, "4")}"]' for n in range(pairs)]
    path = folder / "sevens.toml"
    path.write_text(f'title = "the number seven"\n{more}pairs = [\n' + ",\n".join(rows) + "\n]\n")
    return str(path)


def value(result, metric):
    (score,) = [s for s in result.scores if s.metric == metric]
    return score.value


def test_the_planted_feature_tells_its_concept_perfectly(model, tmp_path):
    config = ConceptsConfig(files=(concept_file(tmp_path),), null_draws=30)
    result = Concepts().run(ConceptBench(model), Identity(torch.eye(D)), config)
    for metric in ("auroc", "auroc_neuron", "auroc_probe", "told", "told_neuron", "precision_strong", "recall"):
        assert value(result, metric) == 1, metric
    assert value(result, "candidates") == 2 * D  # both tails of every dimension
    assert value(result, "auroc_null") == pytest.approx(0.5, abs=0.12)
    rows = {source: [r for r in result.tables["concept_features"] if r["source"] == source] for source in ("feature", "neuron")}
    for source in rows.values():
        assert (source[0]["feature"], source[0]["sign"], source[0]["place"]) == (0, 1, 1) and len(source) == 5
        assert source[0]["p_holm"] == pytest.approx(5 * source[0]["p"]) and source[0]["texts"] == 24
    nulls = [row for row in result.tables["concept_features"] if row["source"] == "null"]
    assert len(nulls) == 30 and value(result, "auroc_null") == pytest.approx(np.mean([row["auroc"] for row in nulls]))
    texts = result.tables["concept_texts"]
    assert len(texts) == 48 and sum(row["held_out"] for row in texts) == 24
    assert all((row["value"] > 0) == row["label"] for row in texts)


def test_given_features_are_tested_without_a_search(model, tmp_path):
    other = tmp_path / "foxes.toml"
    other.write_text('title = "foxes"\nwords = ["fox"]\n')
    files = (concept_file(tmp_path), str(other))
    config = ConceptsConfig(files=files, feature_ids=(9, 0), texts=15, kept=1, null_draws=0)
    upside_down = TopK({"W_enc": -torch.eye(D), "b_enc": torch.zeros(D), "W_dec": -torch.eye(D), "b_dec": torch.zeros(D)}, D)
    for dictionary, auroc, sign in ((Identity(torch.eye(D)), 1.0, 1), (_Negated(torch.eye(D)), 1.0, -1), (upside_down, 0.5, 1)):
        result = Concepts().run(ConceptBench(model), dictionary, config)
        rows = [row for row in result.tables["concept_features"] if row["source"] == "given"]
        assert [(row["concept"], row["feature"], row["place"]) for row in rows] == [
            ("sevens", 0, 1), ("sevens", 9, 2), ("foxes", 0, 1), ("foxes", 9, 2)
        ]  # fmt: skip
        assert rows[0]["auroc"] == auroc and rows[0]["sign"] == sign  # of signed codes the first half chooses the tail
        assert [row["p_holm"] for row in rows] == pytest.approx(holm([row["p"] for row in rows]).tolist())
        planted = {score.metric: score.value for score in result.scores if score.item == 0}
        assert planted["auroc_given"] == pytest.approx(np.mean([row["auroc"] for row in rows[:2]]))
        assert planted["told_given"] == np.mean([row["p_holm"] < 0.05 for row in rows[:2]])
        if auroc == 1:
            assert rows[0]["recall"] == 1 and rows[0]["level_precision"][2] == 1 and sum(rows[0]["level_texts"]) == 12
            assert rows[0]["p_holm"] < 0.05 and rows[2]["p_holm"] > 0.05  # it knows nothing of foxes
        else:
            assert (rows[0]["recall"], rows[0]["level_texts"], rows[0]["p"]) == (0, [0, 0, 0], 1)
    assert not any(s.metric.endswith("_given") for s in Concepts().run(
        ConceptBench(model), Identity(torch.eye(D)), ConceptsConfig(files=files[:1])).scores)  # fmt: skip
    with pytest.raises(UnitFailed, match="no feature 32"):
        Concepts().run(ConceptBench(model), Identity(torch.eye(D)), ConceptsConfig(files=files, feature_ids=(32,)))


class _Negated(Identity):
    """Codes upside down."""

    def encode(self, x):
        return -x


def test_a_dictionary_without_the_feature_does_not_tell(model, tmp_path):
    blind = torch.nn.functional.normalize(torch.randn(20, D, generator=torch.Generator().manual_seed(0)), dim=1)
    blind[:, 0] = 0
    tensors = {"W_enc": blind.T.clone(), "b_enc": torch.zeros(20), "W_dec": blind, "b_dec": torch.zeros(D)}
    # the other dimensions of the two digits differ as well: the same embedding for both
    seven, four = (model.tokenise(f" {digit}")[-1] for digit in "74")
    (weight,) = [w for name, w in model._bridge.original_model.named_parameters() if "embed_tokens" in name]
    kept = weight[four].clone()
    with torch.no_grad():
        weight[four, 1:] = weight[seven, 1:]
        result = Concepts().run(
            ConceptBench(model), TopK(tensors, 20), ConceptsConfig(files=(concept_file(tmp_path, more='words = ["x"]\n'),))
        )
        weight[four] = kept
    assert value(result, "auroc") == pytest.approx(0.5) and value(result, "told") == 0
    assert value(result, "auroc_neuron") == 1 and value(result, "auroc_probe") == 1


def test_labels_from_words_and_from_a_judge_are_the_same_where_the_judge_is_right(model, tmp_path):
    words, asked = tmp_path / "words.toml", tmp_path / "asked.toml"
    words.write_text('title = "seven"\nwords = ["7"]\n')
    asked.write_text('title = "the digit 7"\nquestion = "Is there a seven?"\n')
    judge = ScriptedJudge(simulate=lambda task: [10.0 if "7" in token else 0.0 for token in task.tokens])
    for path in (words, asked):
        config = ConceptsConfig(files=(str(path),), texts=20)
        assert Concepts().asks(config) == (path is asked) and (Concepts().cost(config).calls > 0) == (path is asked)
        result = Concepts().run(ConceptBench(model, judge), Identity(torch.eye(D)), config)
        assert value(result, "auroc") == 1
        if path is asked:
            assert {task.explanation for task in judge.simulated} == {"Is there a seven?"} and len(judge.simulated) == 40
            windows = [s for s in result.scores if s.metric == "judged_yes"]
            assert len({s.item for s in windows}) == 40 and {s.kind for s in windows} == {"window"}
            assert 0.2 < np.mean([s.value for s in windows]) < 0.5  # every third window of the text has a seven
        labels = [row["label"] for row in result.tables["concept_texts"]]
        assert sum(labels) == len(labels) / 2 >= 10
        assert all(("7" in row["text"]) == row["label"] for row in result.tables["concept_texts"])
    with pytest.raises(JudgeSetupError, match="nobody can be asked"):
        Concepts().run(ConceptBench(model), Identity(torch.eye(D)), ConceptsConfig(files=(str(asked),), texts=21))


def test_failed_labels_are_failed_scores_and_asked_again(model, tmp_path):
    asked = tmp_path / "failing.toml"
    asked.write_text('title = "seven"\nquestion = "Is seven in it?"\n')
    config = ConceptsConfig(files=(str(asked),), texts=25)

    def run(fails):
        count = iter(range(1000))
        right = [10.0, 0.0]
        judge = ScriptedJudge(
            simulate=lambda task: None if fails(next(count)) else [right["7" not in token] for token in task.tokens]
        )
        result = Concepts().run(ConceptBench(model, judge), Identity(torch.eye(D)), config)
        windows = [s.status for s in result.scores if s.metric == "judged_yes"]
        assert len(windows) == 50
        statuses = {s.status for s in result.scores if s.metric != "judged_yes"}
        return result, windows.count("failed"), statuses, len(judge.simulated)

    result, failed, statuses, calls = run(lambda n: n >= 10)  # too few are left to search
    assert (failed, statuses, calls) == (40, {"failed"}, 50) and result.tables["concept_features"] == []
    result, failed, statuses, calls = run(lambda n: n == 4)  # asked again: enough are left, and the loss is counted
    assert (failed, statuses, calls) == (1, {"ok"}, 50) and value(result, "auroc") == 1
    assert run(lambda n: False)[1:] == (0, {"ok"}, 50)
    assert run(lambda n: True)[1:] == (0, {"ok"}, 0)  # remembered, now that nothing is missing


def test_a_missing_token_makes_no_window_a_no(model, tmp_path):
    """Every seven has no value in one window, and one of the others in another: the first is unknown, the second a yes."""
    asked = tmp_path / "partly.toml"
    asked.write_text('title = "seven"\nquestion = "Is a seven there?"\n')
    config = ConceptsConfig(files=(str(asked),), texts=24)
    lost = {}

    def levels(task):
        right = [10.0 if "7" in token else 0.0 for token in task.tokens]
        if 10.0 in right and len(lost) < 2:
            lost[len(lost)] = gone = 10.0 if not lost else 0.0
            return [None if level == gone else level for level in right]
        return right

    result = Concepts().run(ConceptBench(model, ScriptedJudge(simulate=levels)), Identity(torch.eye(D)), config)
    windows = [(s.status, s.value) for s in result.scores if s.metric == "judged_yes"]
    assert windows.count(("undefined", None)) == 1 and {status for status, _ in windows} == {"ok", "undefined"}
    assert value(result, "auroc") == 1  # no window with a seven is among those without


def test_ratings_are_the_judges_and_failed_ones_are_missing(model, tmp_path):
    config = ConceptsConfig(files=(concept_file(tmp_path),), rate=4)

    def rates(*answers):
        said = iter(answers)
        judge = ScriptedJudge(rate=lambda task: next(said))
        result = Concepts().run(ConceptBench(model, judge), Identity(torch.eye(D)), config)
        ratings = [row["rating"] for row in result.tables["concept_texts"] if row["rating"] is not None]
        assert len(judge.rated) == 4 and not judge.simulated and {task.concept for task in judge.rated} == {"the number seven"}
        for task in judge.rated:  # the judge sees where the planted feature fires, and nothing else is marked
            assert task.fires == ["7" in token for token in task.tokens] and sum(task.fires) == 1
        return sorted(ratings), {s.metric: (s.value, s.status) for s in result.scores if s.metric.startswith("rating")}

    ratings, scores = rates(3.0, 1.5, 1.5, 1.2)
    assert ratings == pytest.approx([1.2, 1.5, 1.5, 3.0]) and scores["rating"] == (pytest.approx(1.8), "ok")
    assert scores["rating_strong"] == scores["rating"]  # the planted feature knows one strength
    assert scores["rating_weak"] == scores["rating_middle"] == (None, "undefined")
    ratings, scores = rates(3.0, None, 1.5, 1.5)  # three are kept as rows, and the mean waits for the fourth
    assert ratings == [1.5, 1.5, 3.0] and scores["rating"] == scores["rating_strong"] == (None, "failed")
    assert scores["rating_weak"] == (None, "undefined")


def test_ratings_by_level_follow_the_activation(model, tmp_path):
    """The texts say the number one to three times; a feature that counts them has three levels, and so has a judge that does."""
    rows = [f'["{sentence(n, " 7" * (n % 3 + 1))}", "{sentence(n, "4")}"]' for n in range(24)]
    path = tmp_path / "counted.toml"
    path.write_text('title = "how many sevens"\npairs = [\n' + ",\n".join(rows) + "\n]\n")
    judge = ScriptedJudge(rate=lambda task: 0.9 * sum("7" in token for token in task.tokens))
    config = ConceptsConfig(files=(str(path),), rate=6, null_draws=0)
    result = Concepts().run(ConceptBench(model, judge), _Counting(torch.eye(D)), config)
    assert [value(result, f"rating_{level}") for level in concept_search.LEVELS] == pytest.approx([0.9, 1.8, 2.7])
    assert value(result, "rating") == pytest.approx(1.8) and len(judge.rated) == 6  # two of each level
    assert value(result, "precision_null") == 0.5 and value(result, "precision_strong") == 1
    assert Concepts.metrics["precision_strong"].null == "precision_null"
    assert not any(s.metric.startswith("rating") for s in Concepts().run(
        ConceptBench(model), Identity(torch.eye(D)), ConceptsConfig(files=(str(path),))).scores)  # fmt: skip


class _Counting(Identity):
    """Codes are sums over the text up to a token."""

    def encode(self, x):
        return x.cumsum(-2) if x.ndim == 3 else x


def test_texts_are_drawn_from_the_levels_in_turn():
    level = np.array([-1, 0, 0, 0, 0, 0, 1, 1, 2, -1])
    drawn = concept_search.spread(level, 5, np.random.default_rng(0))
    assert drawn == sorted(drawn) and np.bincount(level[drawn]).tolist() == [2, 2, 1]
    assert concept_search.spread(level, 99, np.random.default_rng(0)) == list(range(1, 9))
    assert concept_search.spread(level - 9, 4, np.random.default_rng(0)) == []


def labelled_file(folder: Path, present: int = 15, absent: int = 27, more: str = "") -> Path:
    path = folder / "labelled.toml"
    lists = {"present": ("7", present), "absent": ("4", absent)}
    texts = {label: [sentence(100 * len(digit) + n, digit) for n in range(count)] for label, (digit, count) in lists.items()}
    path.write_text('title = "seven"\n' + "".join(f"{label} = {texts[label]}\n" for label in lists) + more)
    return path


def test_labelled_texts_of_different_numbers_are_divided_by_label(model, tmp_path):
    path = labelled_file(tmp_path)
    concept = load_concept(path)
    assert concept.source == "texts" and (len(concept.present), len(concept.absent)) == (15, 27)
    assert not Concepts().asks(ConceptsConfig(files=(str(path),)))
    result = Concepts().run(ConceptBench(model), Identity(torch.eye(D)), ConceptsConfig(files=(str(path),), null_draws=20))
    for metric in ("auroc", "auroc_neuron", "auroc_probe", "told", "precision_strong", "recall"):
        assert value(result, metric) == 1, metric
    assert value(result, "auroc_null") == pytest.approx(0.5, abs=0.15)
    texts = result.tables["concept_texts"]
    assert [row["text"] for row in texts if row["label"]] == list(concept.present) and len(texts) == 42
    held = [[row["held_out"] for row in texts if row["label"] == label] for label in (True, False)]
    assert sum(held[0]) in (7, 8) and sum(held[1]) in (13, 14)
    assert value(result, "precision_null") == pytest.approx(sum(held[0]) / (sum(held[0]) + sum(held[1])))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda text: text.split("absent")[0], CorpusError, "there are none here"),
        (lambda text: text.split("absent")[0] + "absent = []", CorpusError, "need both labels"),
        (lambda text: text.split("absent")[0] + 'absent = ["one", "two"]', CorpusError, "2 texts cannot show"),
        (lambda text: text.split("present")[0] + 'absent = ["one"]', CorpusError, "need both labels"),
        (lambda text: text.replace("absent = [", 'absent = [" ", '), SuiteError, "text 1 is empty"),
        (lambda text: text.replace("absent = [", "absent = [7, "), SuiteError, "7 is not a string"),
        (lambda text: text.replace("absent", "abesnt"), SuiteError, "unknown key 'abesnt'"),
        (lambda text: text + 'pairs = [["a", "b"]]', SuiteError, "both pairs and labelled"),
        (lambda text: text.replace("absent = [", f"absent = ['{sentence(100, '7')}', "), SuiteError, "stands there twice"),
    ],
)
def test_bad_files_of_labelled_texts_are_refused(change, error, words, tmp_path):
    path = labelled_file(tmp_path)
    load_concept(path)
    path.write_text(change(path.read_text()))
    with pytest.raises(error, match=words) as raised:
        Concepts().check(ConceptsConfig(files=(str(path),)), 128)
    assert "labelled.toml" in str(raised.value)


def test_too_few_texts_are_a_counted_missing_value(model, tmp_path):
    path = tmp_path / "never.toml"
    path.write_text('title = "nothing"\nwords = ["zebra"]\n')
    one_document = ConceptBench(model)
    one_document.activations = one_document.activations._replace(document=torch.zeros(60, dtype=torch.long))
    seven = tmp_path / "seven.toml"
    seven.write_text('title = "seven"\nwords = ["7"]\n')
    for bench, file in ((ConceptBench(model), path), (one_document, seven)):
        result = Concepts().run(bench, Identity(torch.eye(D)), ConceptsConfig(files=(str(file),), texts=19))
        assert {score.status for score in result.scores} == {"undefined"} and result.tables["concept_features"] == []


def test_found_features_hold_up_by_chance_as_often_as_alpha_says():
    told, draws = 0, 300
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        label, group = np.tile([True, False], 20), np.repeat(np.arange(20), 2)
        values = concept_pooling.Values(rng.normal(size=(40, 100)), np.arange(100), np.ones(100, dtype=int))
        found = concept_search.search(values, label, concept_search.halves(label, group, seed), group, 3)
        assert found[0].chosen > 0.6  # the best of 100 looks good where it was chosen
        told += bool((holm([one.p for one in found]) < 0.05).any())
    assert told <= 27  # expected at most 15, standard deviation below 4


def test_aurocs_are_sklearns_and_both_tails_are_candidates():
    rng = np.random.default_rng(1)
    value, label = rng.normal(size=(30, 4)).round(1), rng.random(30) < 0.4
    assert concept_search.aurocs(value, label) == pytest.approx([roc_auc_score(label, column) for column in value.T])
    x = torch.randn(3, 5, D, generator=torch.Generator().manual_seed(1))
    keep = torch.ones(3, 5, dtype=torch.bool)
    keep[:, 0] = False
    signed = concept_pooling.pooled(Identity(torch.eye(D)), x, keep)
    assert signed.value.shape == (3, 2 * D)
    assert signed.value[:, :D] == pytest.approx(x[:, 1:].amax(1).numpy()) and signed.value[:, D:] == pytest.approx(
        -x[:, 1:].amin(1).numpy()
    )
    topk = small_topk()
    assert concept_pooling.pooled(topk, x, keep).value == pytest.approx(topk.encode(x[:, 1:]).amax(1).numpy())


def test_codes_of_a_candidate_are_what_its_value_is_the_largest_of():
    x = torch.randn(6, 5, D, generator=torch.Generator().manual_seed(2))
    keep = torch.rand(6, 5, generator=torch.Generator().manual_seed(3)) < 0.7
    keep[:, 1] = True
    for dictionary, candidates in ((Identity(torch.eye(D)), (3, D + 3)), (small_topk(), (7,))):
        values = concept_pooling.pooled(dictionary, x, keep)
        for candidate in candidates:
            codes = concept_pooling.codes_of(dictionary, values, candidate, x, keep)
            assert np.where(keep, codes, -np.inf).max(1) == pytest.approx(values.value[:, candidate]) and not codes[~keep].any()
    assert concept_pooling.codes_of(small_topk(), values, 7, x[[]], keep[[]]).shape == (0, 5)


def test_halves_keep_groups_whole_and_levels_are_thirds():
    label, group = np.tile([True, False], 10), np.repeat(np.arange(10), 2)
    held = concept_search.halves(label, group, 4)
    assert held.sum() == 10 and all(len(set(held[group == g])) == 1 for g in range(10))
    # documents of every size and mix: none has a partner of its kind, and both halves still get both labels
    group = np.repeat(np.arange(8), np.arange(1, 9))
    label = np.arange(len(group)) % 3 == 0
    for seed in range(20):
        held = concept_search.halves(label, group, seed)
        assert all(len(set(held[group == g])) == 1 for g in range(8)) and abs(held.mean() - 0.5) < 0.15
        assert abs(label[held].sum() - label[~held].sum()) <= 3 and concept_search.divided(label, held)
    assert not concept_search.divided(label, concept_search.halves(label, np.zeros_like(group), 0))
    assert concept_search.level_of(np.array([0.0, -1, 0.1, 3, 5.9, 9, 12]), 9.0).tolist() == [-1, -1, 0, 0, 1, 2, 2]


def test_texts_are_read_as_alone(model):
    bench = ConceptBench(model)
    texts = ["rain", "the fox 7 dog since"]
    rows, x, keep, cut = read_texts(bench, texts)
    assert cut == 0
    alone = model.activations(torch.tensor([model.opened(texts[0])]), HOOK)[:, 1:]
    assert rows == [model.tokenise(text) for text in texts], "the BOS is read before them and is no part of them"
    assert torch.allclose(x[0, : len(rows[0])], alone[0], atol=1e-5)
    assert keep.sum(1).tolist() == [len(row) for row in rows]


def test_texts_longer_than_the_model_reads_are_cut_counted_and_said(model, tmp_path, monkeypatch):
    """Every text has as many tokens as the context but two of the forty-eight, which have more."""
    monkeypatch.setattr(model, "context", 40)
    path = Path(concept_file(tmp_path))
    texts = path.read_text().split("\n")
    texts[2] = texts[2].replace(sentence(0, "7"), sentence(0, "7") + " rain" * 60)
    texts[3] = texts[3].replace(sentence(1, "4"), sentence(1, "4") + " rain" * 60)
    bench, said = ConceptBench(model), []
    monkeypatch.setattr(bench.progress, "say", said.append)
    whole = Concepts().run(bench, Identity(torch.eye(D)), ConceptsConfig(concepts=(), files=(str(path),)))
    assert not [s for s in whole.scores if s.metric == "texts_cut"]
    path.write_text("\n".join(texts))
    result = Concepts().run(bench, Identity(torch.eye(D)), ConceptsConfig(concepts=(), files=(str(path),)))
    (score,) = [s for s in result.scores if s.metric == "texts_cut"]
    assert (score.value, score.n, score.kind) == (2 / 48, 48, "concept")
    assert said == [
        "note: concept sevens: 2 of its 48 texts are longer than the 40 tokens the model reads; what lies beyond is not seen"
    ]


def test_texts_whose_activations_overflow_are_an_error_and_not_left_out(model, monkeypatch):
    activations = type(model).activations

    def broken(self, tokens, hook_point):
        found = activations(self, tokens, hook_point).clone()
        found[0, 1] = float("inf")
        return found

    monkeypatch.setattr(type(model), "activations", broken)
    with pytest.raises(ModelError, match="1 of .* positions of the texts have activations that are not finite"):
        read_texts(ConceptBench(model), ["rain", "the fox 7 dog since"])


def test_texts_of_a_model_without_a_bos_are_read_behind_a_line_end(model, monkeypatch):
    monkeypatch.setattr(model, "bos", None)
    monkeypatch.setattr(model, "opened", model.tokenise)
    rows, _, keep, _ = read_texts(ConceptBench(model), ["rain", "the fox 7 dog since"])
    assert [row[0] for row in rows] == model.tokenise("\n") * 2
    assert keep[0].sum() == len(rows[0]) - 1 and not keep[:, 0].any()


def test_packaged_concepts_are_whole_and_wrong_ones_are_refused(tmp_path):
    assert len(packaged()) >= 9
    for path in Concepts().reads(ConceptsConfig()):
        concept = load_concept(path)
        assert len(concept.pairs) == 24 and concept.words and len(set(sum(map(list, concept.pairs), []))) == 48
    with pytest.raises(SuiteError, match="no packaged concept 'datse'"):
        Concepts().check(ConceptsConfig(concepts=("datse",)), 128)
    few = tmp_path / "few.toml"
    few.write_text('title = "x"\npairs = [["a", "b"]]\n')
    with pytest.raises(CorpusError, match="1 pairs"):
        Concepts().check(ConceptsConfig(files=(str(few),)), 128)
    with pytest.raises(CorpusError, match="7 pairs") as caught:  # never enough to test, words or not
        load_concept(Path(concept_file(tmp_path, 7, 'words = ["seven"]\n')))
    assert "at least 8 pairs" in str(caught.value) and "leave pairs out" in str(caught.value)
    assert len(load_concept(Path(concept_file(tmp_path, 8))).pairs) == 8
    for words in ('[""]', '["rain", "  "]'):
        few.write_text(f'title = "x"\nwords = {words}\n')
        with pytest.raises(SuiteError, match="is blank: every text holds it"):
            load_concept(few)


@pytest.mark.parametrize(
    ("words", "holds", "not_in"),
    [
        (["C++"], ["I like C++ a lot", "c++", "(C++)"], ["C+", "xC++"]),
        (["$"], ["costs $5", "US$"], ["dollar"]),
        (["..."], ["well...", "... and"], [".."]),
        (["rain"], ["Rain!", "the rain"], ["train", "rains", "rain_1"]),
        (["@home", "I'"], ["mail me@home", "I'm"], ["@homes", "Hi'm"]),
    ],
)
def test_words_with_signs_are_found(words, holds, not_in):
    assert all(word_pattern(words).search(text) for text in holds)
    assert not any(word_pattern(words).search(text) for text in not_in)
    assert not word_pattern([]).search("anything") and word_pattern(["C", "C++"]).findall("C++ and C") == ["C++", "C"]


def test_other_settings_that_cannot_work(tmp_path):
    assert Concepts().placed(ConceptsConfig(files=("a.toml",)), tmp_path).files == (str(tmp_path / "a.toml"),)
    with pytest.raises(ValueError, match="kept"):
        ConceptsConfig(kept=0)
