"""Holding features up: what changes nothing, one row at a time against many, a planted word, nulls and missing values."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from judge_fakes import tiny_model
from patching_case import Exact, double_model, small_topk
from tokenizers_case import byte_level, space_before

from evalkit.activations.capture import Activations
from evalkit.concepts.loading import load_concept
from evalkit.dictionaries.controls import Identity
from evalkit.dictionaries.topk import TopK
from evalkit.errors import UnitFailed
from evalkit.evaluations.steering import evaluation as steering
from evalkit.evaluations.steering.evaluation import Steering, SteeringConfig
from evalkit.evaluations.steering.targets import Target, fired_words, long_enough, names, targets_of, word_ids
from evalkit.interventions.generate import Change, added, generate, log_probabilities, uniforms
from evalkit.judges.scripted import ScriptedJudge
from evalkit.models.language_model import LanguageModel
from evalkit.models.loading import ModelConfig
from evalkit.util.progress import Progress

HOOK, D, N, T = "blocks.0.hook_resid_post", 32, 40, 8
DOG = 1
NAMED = [f"named_{key}" for key in ("clamp", "clamp_feature_random", "steer", "steer_feature_random", "steer_random", "none")]
SHORT = {"strengths": (1.0, 3.0), "reported": 3.0, "tokens": 5, "prompts": ("The quick brown", "A detector looks")}


class SteeringBench:
    """The tiny model with a text of random tokens."""

    references, seed, hook_point, name, hook_points = {}, 3, HOOK, "exact", (HOOK,)
    progress = Progress(quiet=True)

    def __init__(self, model, judge=None, often=()):
        self.model, self.judge = model, judge
        tokens = torch.randint(20, 300, (N, T), generator=torch.Generator().manual_seed(1))
        for token in often:
            tokens[::2, 4:6] = torch.tensor([token, model.tokenise(" rain")[0]])
        keep = torch.ones(N, T, dtype=torch.bool)
        keep[:, 0] = False
        self.activations = Activations(model.activations(tokens, HOOK), keep, tokens, torch.arange(N), "text", 1e9)

    def score(self):
        return self.activations


@pytest.fixture(scope="module")
def double(tmp_path_factory) -> LanguageModel:
    return double_model(Path(tmp_path_factory.mktemp("double")))


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> SteeringBench:
    """Blocks do nothing; the token ' dog' alone writes dimension 1, and its logit alone reads it."""
    model = LanguageModel.load(ModelConfig(path=str(tiny_model(tmp_path_factory.mktemp("m") / "m"))), Progress(quiet=True))
    (dog,) = model.tokenise(" dog")
    with torch.no_grad():
        for name, weight in model._bridge.original_model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()
            if "embed_tokens" in name or "lm_head" in name:
                weight[:, DOG] = 0
                weight[dog, DOG] = 3.0
    return SteeringBench(model, often=[dog])


def value(result, metric, feature=DOG):
    (score,) = [s for s in result.scores if s.metric == metric and s.item == feature]
    return score.value


def changes_of(dictionary, amounts, clamp):
    return [Change(f, dictionary.directions[f], amount, clamp) for f, amount in enumerate(amounts)]


@pytest.mark.parametrize("clamp", [False, True])
def test_many_rows_are_whole_runs_of_one_in_float64(double, clamp):
    dictionary = small_topk()
    changes = changes_of(dictionary, [0.7, 1.5, -2.0], clamp)
    text = torch.randint(1, 300, (3, 9), generator=torch.Generator().manual_seed(2))
    with Exact():
        found = torch.cat([log_p for _, log_p in log_probabilities(double, HOOK, dictionary, changes, text, 4)])
        for row, change in enumerate(changes):

            def replaced(x, hook, change=change):
                code = dictionary.encode(x)[..., change.feature].double()
                amount = change.amount - code if clamp else torch.full_like(code, change.amount)
                amount[:, 0] = 0
                return x + amount[..., None] * change.direction.double()

            whole = double.run(text[row][None], [(HOOK, replaced)], use_cache=False).logits[0, 3:-1]
            torch.testing.assert_close(found[row], whole.log_softmax(-1), atol=1e-9, rtol=0)


@pytest.mark.parametrize("clamp", [False, True])
def test_writing_with_kept_keys_is_writing_without(double, clamp):
    dictionary = small_topk()
    changes = changes_of(dictionary, [0.5, 4.0, 8.0], clamp)
    prompt = [5, 60, 7, 80]
    together = generate(double, HOOK, dictionary, changes, prompt, 6)
    for row, change in enumerate(changes):
        text = list(prompt)
        for _ in range(6):
            (log_p,) = [
                found for _, found in log_probabilities(double, HOOK, dictionary, [change], torch.tensor([[*text, 0]]), len(text))
            ]
            text.append(int(log_p[0, -1].argmax()))
        assert together[row].tolist() == text[4:]
    assert len({tuple(row) for row in together.tolist()}) > 1


def test_strength_zero_and_the_present_code_change_nothing(double):
    dictionary, x = small_topk(), torch.randn(2, 5, D, generator=torch.Generator().manual_seed(4))
    assert not added(dictionary, changes_of(dictionary, [0.0, 0.0], False), x, True).any()
    codes = dictionary.encode(x)
    silent = int((codes[0] == 0).all(0).nonzero()[0])
    assert not added(dictionary, [Change(silent, dictionary.directions[silent], 0.0, True)], x[:1], True).any()
    fires = int(codes[0, 2].argmax())
    here = Change(fires, dictionary.directions[fires], float(codes[0, 2, fires]), True)
    assert not added(dictionary, [here], x[:1, 2:3], False).any()
    assert added(dictionary, [here], x[:1, 1:2], False).any() and not added(dictionary, [here], x[:1, :1], True).any()
    # clamped, the code is what was asked for and the rest is as it was
    exact = Identity(torch.eye(D))
    moved = x + added(exact, [Change(3, exact.directions[3], 9.0, True)] * 2, x, False)
    assert (moved[..., 3] - 9).abs().max() < 1e-6 and torch.equal(moved[..., :3], x[..., :3])
    text = torch.tensor([[5, 60, 7, 80, 9]])
    (plain,) = [found for _, found in log_probabilities(double, HOOK, dictionary, [None], text, 2)]
    (zero,) = [found for _, found in log_probabilities(double, HOOK, dictionary, changes_of(dictionary, [0.0], False), text, 2)]
    assert torch.equal(plain, zero)


def test_the_planted_feature_makes_the_model_say_its_word(planted):
    config = SteeringConfig(feature_ids=(DOG,), **SHORT)
    result = Steering().run(planted, Identity(torch.eye(D)), config)
    rows = result.tables["steering_texts"]
    assert {tuple(row["words"]) for row in rows} == {("dog",)} and len(rows) == 2 * 2 * (1 + 2 * 5)
    for mode in ("clamp", "steer"):
        assert value(result, f"named_{mode}") == 1 and value(result, f"shift_{mode}") > 2
        raised = [row["raised"][0] for row in rows if (row["arm"], row["mode"], row["draw"]) == ("feature", mode, 0)]
        assert raised and set(raised) == {" dog"}
    assert value(result, "named_none") < 1
    assert value(result, "shift_steer_random") < value(result, "shift_steer") / 2
    assert value(result, "shift_clamp_feature_random") < value(result, "shift_clamp") / 2
    one = next(row for row in rows if row["arm"] == "feature")
    begin, whole = planted.model.tokenise(one["prompt"]), planted.model.tokenise(one["prompt"] + one["text"])
    log_p = planted.model.logits(torch.tensor([whole]))[0].log_softmax(-1)
    own = [-float(log_p[t - 1, whole[t]]) for t in range(len(begin), len(whole))]
    assert len(own) == 5 and one["nll"] == pytest.approx(sum(own) / 5, abs=1e-4)
    plain = [row for row in rows if row["arm"] == "none"]
    assert all(row["cost"] == 0 and row["shift"] is None and row["kl"] is None for row in plain)
    assert all(row["kl"] > 0 for row in rows if row["arm"] == "feature" and row["draw"] == 0)


@pytest.mark.parametrize("tail", [1, -1])
def test_every_arm_moves_the_activation_as_far_and_to_the_side_of_the_strength(planted, tail):
    dictionary = small_topk()
    dictionary.W_dec *= torch.linspace(0.5, 3, dictionary.n_features)[:, None]  # directions of different lengths
    targets = [Target(feature, tail, 2.0, ("word",), ("word",), "", "", feature) for feature in (4, 40)]
    config = SteeringConfig(strengths=(-2.0, 1.5), reported=1.5)
    rows = steering._rows(planted, dictionary, targets, config)[1:]
    assert len(rows) == 2 * 2 * 5
    x = planted.activations.x[:6].clone()
    for row in rows:
        moved = added(dictionary, [row.change] * len(x), x, True)
        own = dictionary.directions[targets[row.place].feature]
        assert not moved[:, 0].any()
        if row.arm.mode == "clamp":  # as far from where the code is 0
            moved = moved + dictionary.encode(x)[..., row.change.feature, None] * row.change.direction
        assert moved[:, 1:].norm(dim=-1) == pytest.approx(abs(row.strength) * 2.0 * float(own.norm()), rel=1e-4)
        side = torch.sign((moved[:, 1:] * row.change.direction).sum(-1))
        assert (side == (1 if row.strength > 0 else -1) * (1 if row.arm.vector == "random_feature" else tail)).all()


def test_the_best_feature_of_a_concept_is_held_up(planted, tmp_path):
    path = tmp_path / "dogs.toml"
    pairs = [f'["{a} dog {b}", "{a} fox {b}"]' for a in ("rain", "snow", "the", "since") for b in ("storms", "because", "rain")]
    path.write_text('title = "dogs"\nwords = ["dog"]\npairs = [' + ",".join(pairs) + "]\n")
    config = SteeringConfig(files=(str(path),), **SHORT)
    result = Steering().run(planted, Identity(torch.eye(D)), config)
    assert {(row["feature"], row["concept"]) for row in result.tables["steering_texts"]} == {(DOG, "dogs")}
    assert value(result, "named_steer", 0) == 1 and {score.kind for score in result.scores} == {"concept"}
    assert Steering().reads(config) == [path] and not Steering().asks(config)
    wordless = tmp_path / "wordless.toml"
    wordless.write_text(path.read_text().replace('words = ["dog"]\n', ""))
    with pytest.raises(UnitFailed, match="none of the concepts"):
        Steering().run(planted, Identity(torch.eye(D)), SteeringConfig(files=(str(wordless),), **SHORT))


def test_the_judge_is_asked_and_a_failed_call_is_missing(planted):
    config = SteeringConfig(feature_ids=(DOG,), judge=True, **SHORT)
    assert Steering().asks(config) and Steering().cost(config).calls >= 2 * 2 * (1 + 2 * 5)
    count = [0]

    def answer(task):
        count[0] += 1
        return None if count[0] == 3 else [10.0 if "dog" in token else 0.0 for token in task.tokens]

    bench = SteeringBench(planted.model, ScriptedJudge(simulate=answer), [*planted.model.tokenise(" dog")])
    result = Steering().run(bench, Identity(torch.eye(D)), config)
    judged = [row["named_judge"] for row in result.tables["steering_texts"]]
    assert judged.count(None) == 1 and set(judged) == {None, 0.0, 1.0}
    lost = next(row for row in result.tables["steering_texts"] if row["named_judge"] is None)
    assert (lost["arm"], lost["mode"]) == ("random_feature", "clamp") and lost["strength"] == 1.0  # not a reported strength
    shares = {score.metric: score.value for score in result.scores if score.metric.startswith("judged_")}
    assert len(shares) == 6 and shares == {f"judged_{key[6:]}": value(result, key) for key in NAMED}  # as the words say
    assert shares["judged_clamp"] == 1 == shares["judged_steer"] and shares["judged_none"] < 1


def test_an_arm_with_a_failed_call_has_no_share_and_half_of_the_scale_is_yes(planted):
    config = SteeringConfig(feature_ids=(DOG,), judge=True, **SHORT)
    fails = {"text": ""}

    def answer(task):
        text = "".join(task.tokens)
        return None if text == fails["text"] else [5.0 if "dog" in token else 4.9 for token in task.tokens]

    bench = SteeringBench(planted.model, ScriptedJudge(simulate=answer), [*planted.model.tokenise(" dog")])
    whole = Steering().run(bench, Identity(torch.eye(D)), config)
    assert value(whole, "judged_clamp") == 1 and value(whole, "judged_none") == value(whole, "named_none")
    rows = [row for row in whole.tables["steering_texts"] if (row["arm"], row["strength"]) == ("random_direction", 3.0)]
    fails["text"] = rows[0]["text"]
    statuses = {s.metric: s.status for s in Steering().run(bench, Identity(torch.eye(D)), config).scores}
    assert statuses["judged_steer_random"] == "failed" and statuses["named_steer_random"] == statuses["judged_clamp"] == "ok"

    def unclear(task):
        return [None] * len(task.tokens) if (levels := answer(task)) is None else levels

    bench.judge = ScriptedJudge(simulate=unclear)  # no token has a value: the text is left out of the share
    result = Steering().run(bench, Identity(torch.eye(D)), config)
    own = next(s for s in result.scores if s.metric == "judged_steer_random")
    same = [row for row in rows if row["mode"] == "steer"]
    assert (own.status, own.n) == ("ok", len(same) - [row["text"] for row in same].count(fails["text"]))
    assert None in [row["named_judge"] for row in result.tables["steering_texts"]]
    assert not any(metric.startswith("judged") for metric in {s.metric for s in Steering().run(
        bench, Identity(torch.eye(D)), SteeringConfig(feature_ids=(DOG,), **SHORT)).scores})  # fmt: skip


def test_a_concept_whose_labels_failed_is_failed_and_counted_in_the_cost(planted, tmp_path):
    asked, pairs = tmp_path / "asked.toml", tmp_path / "paired.toml"
    asked.write_text('title = "dogs"\nquestion = "Is there a dog?"\nwords = ["dog"]\n')
    own = [f'["{a} dog {b}", "{a} fox {b}"]' for a in ("rain", "snow", "the", "since") for b in ("storms", "because", "rain")]
    pairs.write_text('title = "dogs"\nwords = ["dog"]\npairs = [' + ",".join(own) + "]\n")
    config = SteeringConfig(files=(str(asked), str(pairs)), **SHORT)
    assert Steering().asks(config) and Steering().cost(config).calls == 2 * 60
    count = iter(range(1000))
    judge = ScriptedJudge(simulate=lambda task: None if next(count) else [0.0] * len(task.tokens))
    bench = SteeringBench(planted.model, judge, [*planted.model.tokenise(" dog")])
    result = Steering().run(bench, Identity(torch.eye(D)), config)
    assert {task.explanation for task in judge.simulated} == {"Is there a dog?"}
    by_item = {item: {s.status for s in result.scores if s.kind == "concept" and s.item == item} for item in (0, 1)}
    assert by_item == {0: {"failed"}, 1: {"ok"}}
    assert sorted(s.status for s in result.scores if s.kind == "window") == ["failed"] * (N - 1) + ["ok"]
    with pytest.raises(UnitFailed, match="40 calls to label texts failed"):
        Steering().run(bench, Identity(torch.eye(D)), SteeringConfig(files=(str(asked),), **SHORT))


def test_a_feature_that_never_fires_is_undefined(planted):
    silent = small_topk(k=1, seed=3)
    codes = silent.encode(planted.activations.x)
    feature = int((codes == 0).all(0).all(0).nonzero()[0])
    result = Steering().run(planted, silent, SteeringConfig(feature_ids=(feature,), **SHORT))
    assert {score.status for score in result.scores} == {"undefined"} and result.tables["steering_texts"] == []
    alone = {score.metric: (score.status, score.kind, score.item) for score in result.scores}
    assert set(alone) == set(steering._arms(SteeringConfig())) and set(alone.values()) == {("undefined", "feature", feature)}
    other = int((codes > 0).any(0).any(0).nonzero()[0])
    both = Steering().run(planted, silent, SteeringConfig(feature_ids=(feature, other), **SHORT))
    assert {row["feature"] for row in both.tables["steering_texts"]} == {other}  # nothing is written for the silent one
    assert {s.item for s in both.scores if s.status == "undefined"} == {feature}


def test_the_maximum_is_that_of_the_concepts_texts_where_the_scoring_text_has_less(planted, tmp_path, capsys):
    path = tmp_path / "dogs.toml"
    pairs = [f'["{a} dog {b}", "{a} fox {b}"]' for a in ("rain", "snow", "the", "since") for b in ("storms", "because", "rain")]
    path.write_text('title = "dogs"\nwords = ["dog"]\npairs = [' + ",".join(pairs) + "]\n")
    dictionary = TopK({"W_enc": torch.eye(D), "b_enc": torch.zeros(D), "W_dec": torch.eye(D), "b_dec": torch.zeros(D)}, D)
    bench = SteeringBench(planted.model)  # of random tokens: without a dog the feature is silent in the scoring text
    dog = bench.activations.tokens == planted.model.tokenise(" dog")[0]
    bench.activations.x[..., DOG] = torch.where(dog, 0.0, bench.activations.x[..., DOG])
    assert bench.activations.x[..., DOG].max() <= 1e-6
    (concept,) = [load_concept(path)]
    (target,), (texts,) = targets_of(bench, dictionary, [concept], (), 1, 1)
    assert target.feature == DOG
    assert target.maximum == pytest.approx(float(texts.x[..., DOG][texts.keep].max())) == pytest.approx(3.0, abs=0.2)
    bench.activations.x[0, 3, DOG] = 50.0  # more than the concept's texts hold
    assert targets_of(bench, dictionary, [concept], (), 1, 1)[0][0].maximum == pytest.approx(50.0)
    blind = TopK({"W_enc": -torch.eye(D) * 0, "b_enc": torch.zeros(D), "W_dec": torch.eye(D), "b_dec": torch.zeros(D)}, D)
    bench.progress = Progress()
    result = Steering().run(bench, blind, SteeringConfig(files=(str(path),), **SHORT))
    assert {(s.status, s.kind, s.item) for s in result.scores} == {("undefined", "concept", 0)}
    assert (
        result.tables["steering_texts"] == []
        and "the best one of dogs, is undefined: it fires nowhere" in capsys.readouterr().err
    )


def test_pieces_digits_and_marks_do_not_name_a_feature(planted, tmp_path):
    model = planted.model
    lines = ["the dog rain", "the dogrow since", "snow, 7 dog", "the row rain", "ain, dog, 7", "brow since the"]
    rows = [model.tokenise("\n" + line)[:6] for line in lines]
    tokens = torch.tensor([row + [0] * (6 - len(row)) for row in rows])
    strings = [model.token_strings(row) for row in tokens.tolist()]

    def said(own):
        return fired_words(planted, torch.tensor([[float(own(text)) for text in row] for row in strings]), tokens)

    assert said(lambda text: text.strip() == "dog") == (("dog",), ("dog",))  # thrice a word, once the beginning of one
    words, whole = said(lambda text: text.strip() in ("7", ",", "row"))
    assert set(words) == {"7", ",", "row"} and "row" not in whole and long_enough(whole) == ()
    path = tmp_path / "digits.toml"
    pairs = [f'["{a} dog {b}", "{a} fox {b}"]' for a in ("rain", "snow", "the", "since") for b in ("storms", "because", "rain")]
    path.write_text('title = "dogs"\nwords = ["7", "1990", ","]\npairs = [' + ",".join(pairs) + "]\n")
    result = Steering().run(planted, Identity(torch.eye(D)), SteeringConfig(files=(str(path),), **SHORT))
    statuses = {score.metric: score.status for score in result.scores}
    assert {statuses[metric] for metric in NAMED} == {"undefined"} and statuses["shift_clamp"] == "ok"
    assert {row["named"] for row in result.tables["steering_texts"]} == {None}


def test_words_and_draws(planted):
    assert names("He saw London.", ("london",)) and not names("Londoners", ("london",)) and names("wait...", ("...",))
    assert names("", ("a",)) is False and names("anything", ()) is None
    assert names("I write c++ daily", ("C++",)) and names("in C++.", ("C++",)) and not names("abC++", ("C++",))
    assert long_enough(("7", "1990", "in", "...", "'s", "fox", "New York", "est")) == ("fox", "New York", "est")
    tokens = planted.model.tokenise
    assert len(tokens(" 7")) > 1 and word_ids(planted, ("7", "qqq")) == tokens("7")  # pieces count for nothing
    pieces = [tokens(form) for form in ("qqq", " qqq", "Qqq", " Qqq")]
    with_letters = {next(i for i in ids if planted.model.token_strings([i])[0].strip()) for ids in pieces}
    assert word_ids(planted, ("qqq",)) == sorted(with_letters)  # a bare space in front is no piece of a word
    assert uniforms(0, 1, 0, 5) is None and uniforms(0, 1, 2, 5) == uniforms(0, 1, 2, 5) != uniforms(0, 2, 2, 5)
    ids = generate(planted.model, HOOK, small_topk(), changes_of(small_topk(), [0.0, 0.0], False), [5, 60], 40, [0.999999] * 40)
    assert torch.equal(ids[0], ids[1])  # one draw's numbers are the same for all rows
    drawn = generate(planted.model, HOOK, small_topk(), changes_of(small_topk(), [0.0], False), [5], 30, uniforms(0, 0, 1, 30))
    assert len(set(drawn[0].tolist())) > 5


@pytest.mark.parametrize("wrong", [{"reported": 9.0}, {"strengths": ()}, {"tokens": 1}, {"prompts": ("word",)},
                                   {"feature_ids": (1,), "concepts": ("names",)}])  # fmt: skip
def test_settings_that_cannot_work(wrong):
    with pytest.raises(ValueError):
        SteeringConfig(**wrong)


@pytest.mark.parametrize("spaced", [True, False])
def test_words_are_tokens_of_a_text_and_never_a_bare_space(spaced):
    tokenizer = space_before() if spaced else byte_level(400)
    model = SimpleNamespace(
        tokenise=lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        token_strings=lambda ids: [tokenizer.convert_ids_to_tokens(i).replace("\u2581", " ").replace("\u0120", " ") for i in ids],
    )
    bench = SimpleNamespace(model=model)
    found = model.token_strings(word_ids(bench, ["Mary"]))
    assert " Mary" in found and all(text.strip() == "Mary" for text in found)
    pieces = model.token_strings(word_ids(bench, ["Xerxes"]))
    assert pieces and all(text.strip() for text in pieces)
