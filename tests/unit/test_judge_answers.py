"""What answers say of themselves: whose they are, how they ended, where their tokens lie, what they cost, what they hold."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from evalkit.judges.answers.as_json import json_in
from evalkit.judges.answers.explanations import Reported, alternatives_at, alternatives_of, ended, read, text_of, usage_of
from evalkit.judges.answers.text import one_line
from evalkit.judges.backends.openai import Connection
from evalkit.judges.cost import Usage
from evalkit.judges.digits import DIGITS, as_mapping, read_slot
from evalkit.judges.troubles import Trouble, trouble_in


def whose(choices: Any, n: int = 3) -> list[Any]:
    """The text each of ``n`` prompts gets; None where it gets none."""
    found = read({"choices": choices}, [None] * n, [lambda choice: {"text": choice["text"]}] * n)
    return [one.answer["text"] if one.answer else None for one in found]


@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        ([2, 0, 1], ["b", "c", "a"]),
        (["2", "0", "1"], ["b", "c", "a"]),
        ([2.0, 0.0, 1.0], ["b", "c", "a"]),
        ([0, 0, 0], ["a", "b", "c"]),  # says nothing: the order does
        ([None, None, None], ["a", "b", "c"]),
        ([1, 3, 2], ["a", "c", "b"]),  # counted from 1
        ([8, 9, 10], ["a", "b", "c"]),
        ([0, 1], ["a", "b", None]),
        ([0, 2], ["a", None, "b"]),
        ([1, 2], [None, None, None]),  # the first is missing, or they count from 1
        ([None, None], [None, None, None]),
        ([0], ["a", None, None]),
        ([0, 0, 1], [None, "c", None]),
        ([0, None, 2], [None, None, None]),
        ([0, 1, 2, 3], ["a", "b", "c"]),
        ([None] * 4, [None, None, None]),
        ([], [None, None, None]),
    ],
)
def test_an_answer_goes_to_the_prompt_it_belongs_to_or_to_none(indices: list[Any], expected: list[str | None]) -> None:
    assert whose([{"index": index, "text": text} for index, text in zip(indices, "abcd", strict=False)]) == expected


def test_missing_indices_and_choices_that_are_none() -> None:
    assert whose([{"text": "a"}, {"text": "b"}, {"text": "c"}]) == ["a", "b", "c"]
    for choices in (None, {}, "x", 3, [None, 7, "x"]):
        assert whose(choices) == [None, None, None]
    (one, *_) = read({"choices": [{"index": 0, "text": "a"}]}, [None] * 3, [dict] * 3)[1:]
    assert "1 of 3 prompts" in one.error


def test_an_echo_of_another_prompt_is_no_answer() -> None:
    choices = [{"index": 0, "text": "two"}, {"index": 1, "text": "<s> one"}]
    assert [found.answer for found in read({"choices": choices}, ["one", "two"], [lambda choice: {}] * 2)] == [None, None]
    assert [found.answer for found in read({"choices": choices}, ["two", "one"], [lambda choice: {}] * 2)] == [{}, {}]


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"finish_reason": "content_filter"}, "content filter"),
        ({"finish_reason": "tool_calls"}, "tool"),
        ({"finish_reason": "error"}, "broke the answer off"),
        ({"error": {"message": "upstream died", "code": 502}}, "upstream died"),
        ({"error": "upstream died"}, "upstream died"),
    ],
)
def test_how_an_answer_ended_comes_before_what_it_holds(choice: dict[str, Any], words: str) -> None:
    choices = [{"index": 0, "text": "kept", **choice}, {"index": 1, "text": "kept"}]
    one, two = read({"choices": choices}, [None] * 2, [lambda choice: {"text": choice["text"]}] * 2)
    assert one.answer is None and words in one.error
    assert two.answer == {"text": "kept"}


def test_whatever_a_parser_trips_over_is_a_failed_answer_with_a_reason() -> None:
    def fails(error: Exception) -> Any:
        def parse(choice: dict[str, Any]) -> dict[str, Any]:
            raise error

        return parse

    for error in (AttributeError("a"), OverflowError("a"), KeyError("a"), RecursionError("a"), AssertionError()):
        (one,) = read({"choices": [{"finish_reason": "length"}]}, [None], [fails(error)])
        assert one.answer is None and one.error.startswith("unusable answer: cut off by its length: ")


def test_endings_have_many_names() -> None:
    assert [ended({"finish_reason": said}) for said in ("length", "MAX_TOKENS", "stop", "eos", "whim", None, 3)] == [
        "length", "length", "stop", "stop", "", "", "",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        ({"text": "a"}, "a"),
        ({"message": {"content": "a"}}, "a"),
        ({"message": {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}}, "ab"),
        ({"message": {"content": [{"type": "thinking", "text": "hm"}, {"type": "text", "text": "b"}]}}, "b"),
        ({"message": {"content": "a", "reasoning_content": "hm"}}, "a"),
        ({"message": None, "text": "a"}, "a"),
    ],
)
def test_texts_lie_in_several_places(choice: dict[str, Any], text: str) -> None:
    assert text_of(choice) == text


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"message": {"content": None, "reasoning_content": "hm"}}, "reasoned and gave no answer"),
        ({"message": {"content": "", "reasoning": "hm"}}, "reasoned and gave no answer"),
        ({"message": {"content": None, "refusal": "I will not"}}, "refuses"),
        ({"message": {"content": None, "tool_calls": [{}]}}, "tool"),
        ({"message": {"content": None}}, "no text"),
        ({"message": {"content": [{"type": "image"}]}}, "no text"),
        ({}, "no text"),
    ],
)
def test_an_answer_without_a_text_says_why(choice: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        text_of(choice)


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 10, "completion_tokens": 5}, (10, 5)),
        ({"prompt_tokens": 10.0, "completion_tokens": "5"}, (10, 5)),
        ({"prompt_tokens": 10, "total_tokens": 15}, (10, 5)),
        ({"completion_tokens": 5, "total_tokens": 15}, (10, 5)),
        ({"prompt_tokens": 10}, (10, None)),
        ({"prompt_tokens": -1, "completion_tokens": math.nan}, (None, None)),
        ({"prompt_tokens": True, "completion_tokens": 0.5}, (None, None)),
        ({"prompt_tokens": None, "completion_tokens": None}, (None, None)),
        (None, (None, None)),
        ("many", (None, None)),
    ],
)
def test_what_was_not_counted_is_not_a_number(usage: Any, expected: tuple[int | None, int | None]) -> None:
    assert usage_of({"usage": usage}) == expected
    assert Reported(None, 3).within(Usage(7, 9)) == Usage(7, 3)


PROMPT = "caf\u00e9\tunknown\nrain\tunknown\n"
PIECES = ["caf\u00e9", "\t", "unknown", "\n", "rain", "\t", "unknown", "\n"]
SLOTS = [PROMPT.index("u"), PROMPT.rindex("u", 0, len(PROMPT) - 4)]


def echo(pieces: list[str], offsets: Any, tokens: Any = None) -> dict[str, Any]:
    """Each token's alternatives name the token, so that it shows which were read."""
    return {"logprobs": {"tokens": pieces if tokens is None else tokens, "top_logprobs": list(pieces), "text_offset": offsets}}


def counted(pieces: list[str], length: Any = len) -> list[int]:
    return [sum(map(length, pieces[:place])) for place in range(len(pieces))]


@pytest.mark.parametrize(
    "choice",
    [
        echo(PIECES, counted(PIECES)),
        echo(PIECES, counted(PIECES, lambda piece: len(piece.encode()))),  # in bytes
        echo(PIECES, [offset + 17 for offset in counted(PIECES)]),
        echo(PIECES, None),
        echo(["<s>", *PIECES], [0, *counted(PIECES)]),
        echo(["<s>", *PIECES], [0, *(offset + 3 for offset in counted(PIECES))]),
        echo(["\u2581" + PIECES[0], *PIECES[1:]], None),
        echo(PIECES, counted(PIECES), ["token_id:7"] * len(PIECES)),
        # a character of two tokens, counted twice: the strings do not make up the prompt, the offsets are of characters
        echo(["caf", "\ufffd", "\ufffd", *PIECES[1:]], [0, 3, 3, 4, 5, 12, 13, 17, 18, 25]),
    ],
)
def test_slots_are_found_whatever_offsets_count(choice: dict[str, Any]) -> None:
    assert PROMPT[SLOTS[1] :] == "unknown\n"
    assert alternatives_at(choice, PROMPT, SLOTS) == ["unknown", "unknown"]


def test_a_token_that_does_not_begin_what_stands_there_is_not_read() -> None:
    broken = ["caf", "\ufffd", "\ufffd", *PIECES[1:]]
    shifted = [0, 3, 4, 5, 6, 13, 14, 18, 19, 26]
    assert alternatives_at(echo(broken, shifted), PROMPT, SLOTS) == [None, None]
    joined = ["caf\u00e9", "\tun", "known", *PIECES[3:]]
    assert alternatives_at(echo(joined, counted(joined)), PROMPT, SLOTS) == [None, "unknown"]


@pytest.mark.parametrize("logprobs", [None, {}, [], {"top_logprobs": None}, {"top_logprobs": [1], "text_offset": []}])
def test_logprobs_that_are_none_are_said(logprobs: Any) -> None:
    with pytest.raises(ValueError, match="logprobs"):
        alternatives_at({"logprobs": logprobs}, PROMPT, SLOTS)


def test_next_to_no_probability_carries_no_expectation() -> None:
    rest = {"x": math.log(0.6), "y": math.log(0.3)}
    assert read_slot({"9": math.log(0.09), **rest}).expected == 10.0
    assert read_slot({"9": math.log(0.0001), **rest}).expected is None  # a tenth is not listed, digits perhaps
    known = read_slot({f" {digit}": math.log(0.00001) for digit in DIGITS} | rest)
    assert known.expected == 5.0 and known.mass == pytest.approx(0.0001)  # all are listed: little, but measured
    assert read_slot({}).expected is None


@pytest.mark.parametrize("top", [{"9": math.nan}, {"9": 5.0}, {"9": -0.1, "8": -0.2}, [{"token": "9", "logprob": math.inf}]])
def test_numbers_that_are_no_log_probabilities_are_refused(top: Any) -> None:
    with pytest.raises(ValueError, match="no log probabilities"):
        read_slot(as_mapping(top))


def test_alternatives_of_a_chat_answer_are_found_behind_its_reasoning() -> None:
    def entries(text: str) -> dict[str, Any]:
        return {"content": [{"token": letter, "top_logprobs": [letter + str(n)]} for n, letter in enumerate(text)]}

    text = '{"grade": 2}'
    assert alternatives_of(text, [10], entries(text)) == [["210"]]
    assert alternatives_of(text, [10], entries(f"hm 2 2 {text}")) == [["217"]]
    assert alternatives_of(text, [10], entries("something else 2 entirely")) == []
    for nothing in (None, {}, {"content": None}, {"content": [None, 3]}, "x"):
        assert alternatives_of(text, [10], nothing) == []


GOOD = "names of animals"


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"<think>\nOkay, the user wants a phrase.\n</think>\n\n{GOOD}",
        f"Okay, the user wants a phrase.\n</think>\n\n{GOOD}",  # the opening stood in the prompt
        f"<thinking>a</thinking>\n<reasoning>b</reasoning>{GOOD}",
        f"[THINK]a[/THINK]{GOOD}",
        f"<|begin_of_thought|>a<|end_of_thought|>\n{GOOD}",
        f"<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>{GOOD}<|return|>",
        f"analysisWe need a phrase.assistantfinal{GOOD}",
        f"<|im_start|>assistant\n{GOOD}<|im_end|>",
        f"<s> {GOOD}</s>",
        f"<answer>{GOOD}</answer>",
        f"```\n{GOOD}\n```",
        f'```json\n{{"explanation": "{GOOD}"}}\n```',
        f"Sure! Here is a short phrase:\n\n{GOOD}",
        f"Certainly, here's one: {GOOD}",
        f"Okay.\n{GOOD}",
        f"**Feature:** {GOOD}",
        f"**Feature**: {GOOD}",
        f"## Explanation\n{GOOD}",
        f"Explanation:\n- {GOOD}",
        f"Reasoning: these are beasts.\nAnswer: {GOOD}",
        f"**{GOOD}**",
        f"\u201c{GOOD}\u201d",
        f"{GOOD}\n\nThe feature fires on fox and dog.",
        f"<think>a</think> {GOOD}",
        f"Okay, the user wants a phrase. </think> {GOOD}",
        f"Thinking...\nOkay, the user wants a phrase.\n...done thinking.\n\n{GOOD}",
        f"assistant\n\n{GOOD}",
        f"Assistant: {GOOD}",
        f"Title: {GOOD}",
        f"**Theme:** {GOOD}",
        f"Okay\n{GOOD}",
        f"Sure, here you go:\n{GOOD}",
        f"Based on the fragments: {GOOD}",
        f"I think the answer is: {GOOD}",
        f"Okay, so I need to think.\n\nAnswer: {GOOD}",
        f"1. {GOOD}\n2. birds",
        f"{GOOD} <|im_end|>",
        f"{GOOD}<|endoftext|>Human: the next question",
        f'{{"explanation": "{GOOD}", "confidence": "high"}}',
        f'{{"reasoning": "these are beasts", "answer": "{GOOD}"}}',
        f'Sure! {{"note": "beasts", "Description": "{GOOD}"}}',
        f'{{"explanation": "{GOOD}", "confid',
        f'{{"explanation": "{GOOD}',
        f'{{"text": "a fragment", "explanation": "{GOOD}',
        f'Here it is: {{"explanation": "{GOOD}',
    ],
)
def test_the_answer_is_found_inside_what_stands_around_it(text: str) -> None:
    assert one_line(text) == GOOD


@pytest.mark.parametrize(
    "text",
    [
        "<think>\nOkay, the user wants a short phrase about",
        "<think>",
        "<s><think>hm",
        "[THINK]hm",
        "<|channel|>analysis<|message|>We need a phrase",
        "analysisWe need a phrase",
        "<think>hm</think>",
        "Okay, the user wants a short phrase about the tokens",
        "Reasoning: these are beasts.",
        "I'm sorry, but I can't help with that.",
        "I\u2019m sorry, I cannot assist with this request.",
        "**Answer:** I can't help with that.",
        "I am unable to provide an answer.",
        "As an AI language model, I have no opinion.",
        "Lo siento, no puedo ayudar con eso.",
        "Sure!",
        "Here is a short phrase:",
        "Feature:",
        "<tag>",
        '{"activations": [1, 2]}',
        '{"reason": "a", "because": "b"}',
        '{"expl',
        "Thinking...\nOkay, the user wants",
        "Okay",
        "Sure.",
        "Here is the explanation.",
        "assistant",
        "Okay, so I need to find what these have in common",
        "Hmm, the tokens are all animals.",
        "I cannot determine a pattern",
        "I'm unable to identify a common theme.",
        "I do not have enough information.",
        "I am not sure what this is.",
        "Unfortunately, I can't tell.",
        "There is no clear pattern",
        "No discernible pattern in the given examples.",
        "Sorry.",
        "Sorry, but no.",
        "I apologize, but this is beyond me.",
        "N/A",
        "None",
        "unknown",
        "Error: the model timed out",
        "The request timed out.",
        "Rate limit exceeded",
        "502 Bad Gateway",
        "null",
        "Thinking...",
        "No explanation available.",
        "Not enough information to tell.",
        "Insufficient data",
        "It is not possible to determine a pattern.",
        "It's unclear what this detects.",
        "The pattern is unclear.",
        "Unable to determine",
        "unable to identify a clear pattern",
        "It cannot be determined.",
        "The examples do not share any clear pattern.",
        "These tokens have no common theme",
        "Je suis d\u00e9sol\u00e9, mais je ne peux pas aider.",
        "Ich kann dabei leider nicht helfen.",
        "No puedo ayudar con eso.",
        "\u62b1\u6b49\uff0c\u6211\u65e0\u6cd5\u56de\u7b54",
        "",
        None,
        ["names"],
    ],
)
def test_what_is_no_explanation_is_refused(text: Any) -> None:
    with pytest.raises(ValueError):
        one_line(text)


@pytest.mark.parametrize(
    "text",
    [
        "sure, certainly and other words of assent", "words before a colon:", "analysis of data", "answer", "thinking",
        "I can't believe", "the phrase I am sorry", "the tag <br>", "given names", "think tanks",
        'apologies and "I cannot" statements', 'phrases like "as an AI language model"', "As an AI disclaimers",
        "sorry and please", "unknown words", "error messages", "no clear pattern, mostly punctuation", "none of the others",
        "d\u00e9sol\u00e9 and other French apologies",
        "<think> and </think> tags", "the token </s>", "the <|endoftext|> token", "tokens such as <|endoftext|>",
        "the </think> token",
        "</think> tags", "<|endoftext|> tokens", "the <answer> and </answer> tags", "analysis by the assistant finally",
        "Given names: John, Mary", "based on: citations", "I think: hedges", "Analysis: chemical", "__init__", "# hashtags",
        "unable to and other words of inability", "404 error pages", "null pointers", "undefined variables in JavaScript",
        "time-outs of requests", "cannot be used before a verb", "the texts that have no verb", "not enough, too few: lack",
        "a { brace that is never closed", "3. Person pronouns", "okay as assent", "{ and } braces", 'JSON such as {"a": 1}',
    ],
)  # fmt: skip
def test_explanations_about_such_words_stay_as_they_are(text: str) -> None:
    assert one_line(text) == text


def test_an_explanation_of_megabytes_is_cut() -> None:
    assert len(one_line("x" * 10_000_000)) <= 20_000


@pytest.mark.parametrize("around", ["{}", "```json\n{}\n```", '<think>\n{{"grade": 1}}\n</think>\n{}', "Sure! {} Good luck!"])
def test_json_is_found_inside_what_stands_around_it(around: str) -> None:
    text = around.format('{"grade": 3}')
    found = json_in(text, "grade")
    assert found.value == {"grade": 3} and json.loads(text[found.start : found.end]) == found.value


@pytest.mark.parametrize("mark", ["</think>", "a.</think>", "<think>", "</s>", "<|im_end|>"])
@pytest.mark.parametrize("before", ["", "```json\n", "<think>hm</think>\n"])
def test_json_may_hold_the_marks_of_reasoning_and_templates(mark: str, before: str) -> None:
    written = json.dumps({"activations": [{"token": mark, "activation": 3}, {"token": " x", "activation": 0}]})
    assert json_in(before + written, "activations").value == json.loads(written)


def test_a_mark_in_json_behind_words_and_other_json_is_part_of_it() -> None:
    assert json_in('First {"a": 1}.\n</think>\n\n{"grade": 3, "why": "a. </think>"}', "grade").value["grade"] == 3
    assert json_in('{"grade": 1}\n</think>\nSo: {"grade": 3}', "grade").value == {"grade": 3}
    with pytest.raises(ValueError, match="no JSON object"):
        json_in('Draft: {"grade": 1}\n</think>\nnothing', "grade")


@pytest.mark.parametrize("text", ["", "3", '{"grade": 3', '{"mark": 3}', '<think>{"grade": 3}'])
def test_json_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        json_in(text, "grade")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"error": {"message": "slow down", "code": 429}}, Trouble(429, "slow down")),
        ({"error": {"message": "no", "code": "rate_limit_exceeded", "status": 429}}, Trouble(429, "no", "rate_limit_exceeded")),
        ({"error": "no such endpoint"}, Trouble(0, "no such endpoint")),
        ({"error": "busy", "error_type": "overloaded"}, Trouble(0, "busy", "overloaded")),
        ({"object": "error", "message": "no", "code": 400}, Trouble(400, "no")),
        ({"detail": "not here"}, Trouble(0, "not here")),
        ([{"error": {"message": "no", "code": 503}}], Trouble(503, "no")),
        ({"choices": [{"error": {"message": "no", "code": 502}}]}, Trouble(502, "no")),
        ({"message": "no such path"}, Trouble(0, "no such path")),
        ({"msg": "slow down", "code": 1302}, Trouble(0, "slow down")),
        ({"base_resp": {"status_code": 1004, "status_msg": "login failed"}, "choices": None}, Trouble(0, "login failed")),
        ({"status": "error", "message": "no"}, Trouble(0, "no")),
        ({"status": 429, "title": "Too Many Requests"}, Trouble(429, "Too Many Requests")),
        ({"errors": [{"message": "no", "code": 503}], "success": False}, Trouble(503, "no")),
        ({"errors": ["no"]}, Trouble(0, "no")),
        ({"errors": "no"}, Trouble(0, "no")),
        ({"errors": {"message": "no", "code": 503}}, Trouble(503, "no")),
        ({"success": False, "msg": "no"}, Trouble(0, "no")),
        ({"error": {"message": "no", "code": "limit", "type": "insufficient_quota"}}, Trouble(0, "no", "insufficient_quota")),
    ],
)
def test_errors_inside_an_answer_are_read_in_the_forms_servers_use(body: Any, expected: Trouble) -> None:
    assert trouble_in(body) == expected


def test_an_answer_is_no_error_and_a_page_with_a_status_is_one() -> None:
    for body in ({"choices": [{}], "error": None}, {}, {"choices": [{"error": None}]}, "text", [], None, {"error": {}}):
        assert trouble_in(body) is None
    for beside in ({"message": "ok"}, {"base_resp": {"status_code": 0}}, {"errors": []}, {"status": "completed"}):
        assert trouble_in({"choices": [{}], **beside}) is None
    assert trouble_in({"base_resp": {"status_code": 0}, "errors": [], "success": True, "status": "done"}) is None
    assert trouble_in("<html><body>Bad  gateway</body></html>", 502) == Trouble(502, "Bad gateway")
    assert trouble_in({}, 400).kind == "request"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("kind", "troubles"),
    [
        ("passing", [(429, "slow"), (500, ""), (503, "content safety service down"), (529, ""), (408, ""), (0, "overloaded"),
                     (0, "Too many requests"), (0, "please try again later")]),
        ("prompt", [(400, "maximum context length is 9 tokens"), (413, ""), (400, "prompt is too long: 9 > 8"),
                    (422, "`inputs` tokens + `max_new_tokens` must be <= 2048"), (500, "the request exceeds the context size"),
                    (400, "The input token count (9) exceeds the maximum number of tokens allowed (8)."),
                    (400, "the response was filtered due to content management policy"), (403, "flagged by moderation"),
                    (400, "rejected as a result of our safety system"), (451, "prohibited content"),
                    (400, "max_tokens is too large: this model's maximum context length is 9 tokens"),
                    (400, "no", "content_policy_violation")]),
        ("key", [(401, ""), (403, "this key may not do that"), (403, "you are not authorized"), (0, "invalid api key")]),
        ("forbidden", [(403, ""), (403, "not for you"), (403, "Request blocked. Ray 7"), (403, "403 Forbidden nginx"),
                       (403, "You have been blocked by a security rule. If this is your account, give the Ray ID.")]),
        ("credit", [(402, ""), (403, "insufficient credits"), (429, "no", "insufficient_quota"),
                    (429, "billing hard limit reached"), (429, "no", "billing_hard_limit_reached")]),
        ("absent", [(404, "no such model"), (405, ""), (501, ""), (302, ""), (404, "the model 'safety-guard' does not exist"),
                    (400, "the model 'safety-guard' does not exist", "model_not_found"),
                    (404, "The model `sensitive-7b` was not found"), (404, "no server allows moderated prompts")]),
        ("request", [(400, "bad"), (422, "field required"), (0, "unexpected endpoint"),
                     (400, "max_tokens is too large: 50000. This model supports at most 16384 completion tokens"),
                     (400, "Unsupported parameter: 'safety_settings'"), (400, "Unknown field 'moderation' in the request"),
                     (400, "model names are case-sensitive"), (400, "no", "unsupported_parameter"),
                     (400, "Extra inputs are not permitted: safety_identifier"),
                     (400, "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.")]),
    ],
)  # fmt: skip
def test_troubles_are_of_seven_kinds(kind: str, troubles: list[Any]) -> None:
    assert {Trouble(*trouble).kind for trouble in troubles} == {kind}
    assert Trouble(429, "no", "insufficient_quota").kind == "credit"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('the word "but"', 'the word "but"'),
        ('"quotes" and "more quotes"', '"quotes" and "more quotes"'),
        ("words like `for` and `while`", "words like `for` and `while`"),
        ("'s", "'s"),
        ('"names of animals"', "names of animals"),
        ("\u201cships\u201d", "ships"),
        ('"cut off', "cut off"),
    ],
)
def test_quotes_around_the_whole_are_taken_off_and_others_stay_whole(text: str, kept: str) -> None:
    assert one_line(text) == kept


@pytest.mark.parametrize(
    ("choice", "how"),
    [
        ({"finish_reason": "model_length"}, "length"),
        ({"finish_reason": "FinishReason.SAFETY"}, "filter"),
        ({"finish_reason": "stop", "native_finish_reason": "SAFETY"}, "filter"),
        ({"finish_reason": "insufficient_system_resource"}, "error"),
        ({"finish_reason": None, "stop_type": "limit"}, "length"),
        ({"finish_reason": "stop", "stop_reason": "."}, "stop"),
        ({"finish_reason": "unspecified"}, ""),
        ({"finish_reason": "unspecified", "stop_reason": "end_turn"}, "stop"),
        ({}, ""),
    ],
)
def test_how_an_answer_ended_in_the_words_of_many_servers(choice: dict[str, Any], how: str) -> None:
    assert ended(choice) == how


def test_an_empty_error_beside_an_answer_is_none_and_a_refused_key_is_one() -> None:
    assert trouble_in({"choices": [{"text": "x"}], "error": {"code": None, "message": None}}) is None
    kind = lambda status, message: Trouble(status, message).kind  # noqa: E731
    assert kind(400, "API key not valid. Please pass a valid API key.") == "key"
    assert kind(400, "invalid key 'foo' in the request") == "request"
    assert kind(400, "Your credit balance is too low") == "credit"
    assert "sk-secret" not in repr(Connection("http://x/v1", "sk-secret"))
