"""Tasks: pairs differ where they should, answers are the right tokens, and a wrong file is refused with its line."""

from __future__ import annotations

import json
import math
import re
from collections import Counter

import pytest
import torch
from tokenizers_case import space_before

from evalkit.errors import CorpusError, SuiteError
from evalkit.tasks import ioi
from evalkit.tasks.base import TASKS, Average, Pairs, build_pairs, logit_difference, next_token, report, single_token


class Words:
    """A tokenizer of words with the space in front, and of single digits; words it is told to are cut in two."""

    def __init__(self, cut: tuple[str, ...] = ()) -> None:
        self.ids: dict[str, int] = {}
        self.cut = cut

    def __call__(self, text: str) -> list[int]:
        found = []
        for part in re.findall(r" ?[A-Za-z]+| ?[0-9]|[^A-Za-z0-9]", text):
            halves = [part[:3], part[3:]] if part.strip() in self.cut else [part]
            found += [self.ids.setdefault(half, len(self.ids) + 1) for half in halves]
        return found

    def text(self, ids) -> str:
        back = {number: part for part, number in self.ids.items()}
        return "".join(back[int(i)] for i in ids)


def test_the_four_tasks_are_there():
    assert TASKS.names() == ["agreement", "greater_than", "ioi", "jsonl"]


@pytest.mark.parametrize("task", ["ioi", "greater_than", "agreement"])
def test_pairs_differ_in_one_token_and_repeat_by_seed(task):
    words = Words()
    pairs = build_pairs(task, words, 40, 3)
    again, other = build_pairs(task, words, 40, 3), build_pairs(task, words, 40, 4)
    assert pairs.texts == again.texts != other.texts
    assert torch.equal(pairs.base, again.base)
    assert ((pairs.base != pairs.target).sum(1) == 1).all()
    for row, (base, target) in enumerate(pairs.texts):
        last, changed = int(pairs.last[row]), int(pairs.changed[row])
        assert words.text(pairs.base[row, : last + 1]) == base
        assert words.text(pairs.target[row, : last + 1]) == target
        assert pairs.base[row, changed] != pairs.target[row, changed]
        assert torch.equal(pairs.base[row, :changed], pairs.target[row, :changed])
        assert (pairs.base[row, last + 1 :] == 0).all()
    assert (pairs.base_answer != pairs.target_answer).all()
    assert (pairs.base_answer != pairs.wrong).all()


def test_ioi_answers_are_the_names_and_both_orders_come_up():
    words = Words()
    pairs = build_pairs("ioi", words, 60, 0)
    first_is_subject = []
    for row, (base, target) in enumerate(pairs.texts):
        io, s, new = (words.text([x[row]]) for x in (pairs.base_answer, pairs.wrong, pairs.target_answer))
        assert (base.count(io), base.count(s), base.count(new)) == (1, 2, 0)
        assert (target.count(io), target.count(s), target.count(new)) == (0, 2, 1)
        first_is_subject.append(base.index(s) < base.index(io))
    assert 15 < sum(first_is_subject) < 45
    only = build_pairs("ioi", words, 20, 0, orders=["abba"])
    assert all(base.index(words.text([i])) < base.index(words.text([s]))
               for (base, _), i, s in zip(only.texts, only.base_answer, only.wrong, strict=True))  # fmt: skip


def test_the_other_counterfactuals():
    words = Words()
    swapped = build_pairs("ioi", words, 20, 1, counterfactual="s")
    assert ((swapped.base != swapped.target).sum(1) == 2).all()
    assert torch.equal(swapped.base_answer, swapped.target_answer)
    unrelated = build_pairs("ioi", words, 20, 1, counterfactual="abc")
    assert ((unrelated.base != unrelated.target).sum(1) == 3).all()
    for row in range(20):
        names = unrelated.target[row][unrelated.base[row] != unrelated.target[row]]
        assert len(names.unique()) == 3


def test_there_are_fifteen_frames_and_every_one_fills():
    assert len(set(ioi.FRAMES)) == 15
    assert len(set(ioi.NAMES)) == len(ioi.NAMES)
    for frame in ioi.FRAMES:
        assert frame.format(x="A", y="B", s="B", place="lake", object="map").endswith(" to")


def test_names_of_several_tokens_are_left_out():
    kept = ("Mary", "John", "Paul", "Lucy", "Emma", "Anna", "Peter", "Tom", "Rose", "Jack")
    words = Words(cut=tuple(name for name in ioi.NAMES if name not in kept))
    pairs = build_pairs("ioi", words, 30, 0)
    named = {words.text([i]).strip() for column in (pairs.base_answer, pairs.target_answer, pairs.wrong) for i in column}
    assert named <= set(kept)
    with pytest.raises(CorpusError, match="9 of"):
        build_pairs("ioi", Words(cut=tuple(name for name in ioi.NAMES if name not in kept[:9])), 3, 0)


def test_greater_than_answers_are_on_the_right_side_of_the_year():
    words = Words()
    pairs = build_pairs("greater_than", words, 50, 0)
    for row, (base, target) in enumerate(pairs.texts):
        early, late = (int(re.search(r"\d{4}", text)[0][2]) for text in (base, target))
        right, new, wrong = (int(words.text([x[row]])) for x in (pairs.base_answer, pairs.target_answer, pairs.wrong))
        assert wrong < early < right < late < new


def test_agreement_follows_the_subject_and_the_distractor_setting():
    words = Words()
    plural = {" are", " were", " have"}
    for setting in ("same", "other"):
        pairs = build_pairs("agreement", words, 40, 0, distractor=setting)
        for row, (base, _) in enumerate(pairs.texts):
            subject = words.text([pairs.base[row, pairs.changed[row]]])
            assert (words.text([pairs.base_answer[row]]) in plural) == subject.endswith("s")
            assert (base.endswith("s") == subject.endswith("s")) == (setting == "same")


def test_pairs_of_a_file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    lines = [
        {"base": "one two", "target": "six two", "base_answer": " x", "target_answer": " y"},
        {"base": "a b c", "target": "a d c", "base_answer": " p", "target_answer": " q", "wrong": " r"},
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    words = Words()
    pairs = build_pairs("jsonl", words, 10, 0, path=str(path))
    assert pairs.n == 2
    assert [words.text([i]) for i in pairs.wrong] == [" y", " r"]
    assert pairs.changed.tolist() == [0, 1] and pairs.last.tolist() == [1, 2]
    assert build_pairs("jsonl", words, 1, 0, path=str(path)).n == 1


def test_a_line_of_a_file_ends_at_a_line_feed_alone_and_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "pairs.jsonl"
    lines = [
        {"base": "one\u2028two", "target": "six\u2028two", "base_answer": " x", "target_answer": " y"},
        {"base": "a\u0085b c", "target": "a\u0085d c", "base_answer": " p", "target_answer": " q"},
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\r\n" for line in lines)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    pairs = build_pairs("jsonl", Words(), 10, 0, path=str(path))
    assert pairs.texts == [(line["base"], line["target"]) for line in lines]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"base": "a", "target": "b", "base_answer": " x"}', "'target_answer' is missing"),
        ('{"base": "a", "target": "b", "base_anser": " x", "target_answer": " y"}', "no field 'base_anser'"),
        ('{"base": "a b", "target": "a", "base_answer": " x", "target_answer": " y"}', "2 and 1 tokens"),
        ('{"base": "a b", "target": "a b", "base_answer": " x", "target_answer": " y"}', "the same"),
        ('{"base": "a b", "target": "a c", "base_answer": " x", "target_answer": " x"}', "begin with the same token"),
        ('{"base": "a b", "target": "a c", "base_answer": "x", "target_answer": " y"}', "joins the answer"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, words):
    path = tmp_path / "pairs.jsonl"
    good = json.dumps({"base": "one two", "target": "six two", "base_answer": " x", "target_answer": " y"})
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(CorpusError, match=words) as caught:
        build_pairs("jsonl", Words(), 10, 0, path=str(path))
    assert "line 2" in caught.value.where
    assert caught.value.fix


def test_settings_are_checked():
    with pytest.raises(SuiteError, match="no setting 'counterfactuel'") as caught:
        build_pairs("ioi", Words(), 3, 0, counterfactuel="io")
    assert "counterfactual" in caught.value.fix
    with pytest.raises(SuiteError, match="no counterfactual 'x'"):
        build_pairs("ioi", Words(), 3, 0, counterfactual="x")
    with pytest.raises(SuiteError, match="0 pairs"):
        build_pairs("ioi", Words(), 0, 0)
    with pytest.raises(SuiteError, match="no task called 'ioj'"):
        build_pairs("ioj", Words(), 3, 0)
    with pytest.raises(CorpusError, match="cannot be read"):
        build_pairs("jsonl", Words(), 3, 0, path="nowhere.jsonl")


def test_next_token_sees_a_join():
    words = Words()
    assert next_token(words, "one two", " three") == words(" three")[0]
    assert next_token(words, "one two", "three") is None


class Favours:
    """A model whose logits are 2 for one token, at the last real position only, and 0 elsewhere."""

    def __init__(self, token: int, last: torch.Tensor) -> None:
        self.token, self.last = token, last
        self.start = 0

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*tokens.shape, 10)
        rows = torch.arange(len(tokens))
        logits[rows, self.last[self.start : self.start + len(tokens)], self.token] = 2.0
        self.start += len(tokens)
        return logits


def test_report_reads_the_last_real_position():
    base = torch.tensor([[1, 2, 0], [3, 4, 5]])
    pairs = Pairs(base, base, torch.tensor([1, 2]), torch.tensor([0, 0]), torch.tensor([7, 8]), torch.tensor([8, 7]),
                  torch.tensor([8, 7]), [("a", "b")] * 2)  # fmt: skip
    found = report(Favours(7, pairs.last), pairs)
    assert found.accuracy == Average(0.5, 2, (1.0, 0.0))
    assert found.logit_difference.values == (2.0, -2.0)
    probability = math.exp(2) / (math.exp(2) + 9)
    assert found.answer_probability.values[0] == pytest.approx(probability)
    assert found.answer_probability.values[1] == pytest.approx(1 / (math.exp(2) + 9))


def test_logit_difference_takes_each_prompt_its_own_tokens():
    logits = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    assert logit_difference(logits, torch.tensor([2, 0]), torch.tensor([0, 1])).tolist() == [3.0, -8.0]


def test_take_keeps_rows_together():
    pairs = build_pairs("agreement", Words(), 6, 0)
    part = pairs.take([4, 1])
    assert part.texts == [pairs.texts[4], pairs.texts[1]]
    assert torch.equal(part.base, pairs.base[[4, 1]]) and torch.equal(part.wrong, pairs.wrong[[4, 1]])


@pytest.mark.parametrize("task", ["ioi", "greater_than", "agreement"])
@pytest.mark.parametrize("seed", [0, 1])
def test_arms_share_what_they_must(task, seed):
    pairs = build_pairs(task, Words(), 61, seed)
    assert [source.arm for source in pairs.sources] == [0, 1, 2] * 20 + [0]
    templates, words = ([{part for s in pairs.sources if s.arm == arm for part in get(s)} for arm in range(3)]
                        for get in (lambda s: [s.template], lambda s: s.words))  # fmt: skip
    assert templates[0] and templates[1] and not templates[0] & (templates[1] | templates[2])
    # a small stock of names, each of which is met where the ordering is found; and others that are met nowhere else
    assert words[1] <= words[0] and len(words[0]) <= 8 and words[2] and not words[2] & words[0]
    for source, texts in zip(pairs.sources, pairs.texts, strict=True):
        assert any(word in text for word in source.words for text in texts)
    assert pairs.take([3, 0]).sources == (pairs.sources[3], pairs.sources[0])


@pytest.mark.parametrize("counterfactual", ["io", "s", "abc"])
def test_names_that_are_exchanged_come_equally_often(counterfactual):
    """Twelve pairs of an arm exchange 24 of 8 names: each three times, so that none of them is unseen."""
    pairs = build_pairs("ioi", Words(), 36, 0, counterfactual=counterfactual)
    names = [(Counter(re.findall(r"[A-Z][a-z]+", base)), Counter(re.findall(r"[A-Z][a-z]+", target)), source.arm)
             for source, (base, target) in zip(pairs.sources, pairs.texts, strict=True)]  # fmt: skip
    exchanged = Counter(name for base, target, arm in names if arm == 0 for name in (base - target) | (target - base))
    exchanged = Counter({name: count for name, count in exchanged.items() if name in ioi.NAMES})
    if counterfactual != "abc":
        assert len(exchanged) == 8 and set(exchanged.values()) == {3}
    else:
        assert len(exchanged) == 8 and max(exchanged.values()) - min(exchanged.values()) <= 1


def test_every_name_of_a_prompt_is_named_in_its_source():
    words = Words()
    for counterfactual in ("io", "s", "abc"):
        pairs = build_pairs("ioi", words, 20, 2, counterfactual=counterfactual)
        for source, texts in zip(pairs.sources, pairs.texts, strict=True):
            found = {name for name in ioi.NAMES for text in texts if re.search(rf"\b{name}\b", text)}
            assert found == set(source.words)


def test_words_are_counted_inside_a_sentence():
    tokenizer = space_before()

    def alone(text):
        """As the tokenizer has it, a bare space in front of a word that begins with one."""
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    assert len(alone(" Mary")) == 2 and single_token(alone, ["Mary", "Xerxes"]) == ["Mary"]


@pytest.mark.parametrize("task", ["ioi", "agreement"])
def test_tasks_are_made_where_the_tokenizer_puts_a_space_before_a_text(task):
    words = Words()

    def spaced(text):
        return words(" " + text)  # a first word is read as behind a space; one that has its own, as behind two

    pairs = build_pairs(task, spaced, 8, 0)
    assert pairs.n == 8 and ((pairs.base != pairs.target).sum(1) == 1).all()


def test_prompts_are_read_behind_the_bos_and_it_is_not_what_differs():
    words = Words()
    plain, behind = build_pairs("ioi", words, 6, 0), build_pairs("ioi", words, 6, 0, bos=9999)
    assert (behind.base[:, 0] == 9999).all() and (behind.target[:, 0] == 9999).all()
    assert torch.equal(behind.base[:, 1:], plain.base) and torch.equal(behind.target[:, 1:], plain.target)
    assert torch.equal(behind.last, plain.last + 1) and torch.equal(behind.changed, plain.changed + 1)
    with pytest.raises(CorpusError, match="begins with the token that is put before every text"):
        build_pairs("ioi", words, 6, 0, bos=int(plain.base[0, 0]))
