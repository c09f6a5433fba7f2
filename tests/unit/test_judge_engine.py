"""The engine against plain forward passes of the same tiny random model in float32."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from judge_fakes import tiny_model
from tokenizers_case import byte_level, space_before

from evalkit.judges.backends.engine import ROWS, BadRequest, Engine
from evalkit.judges.base import SimulateTask
from evalkit.judges.prompts.simulation import simulate_prompt

FRAGMENTS = [["the", " rain", " of", " 1921"], [" dog"], [" because", "\n", " snow", " the", " fox", " jumps", "\t", " years"]]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine.load(tiny_model(tmp_path_factory.mktemp("model")), "float32")


def slot_prompts(engine: Engine):
    prompts = [simulate_prompt(SimulateTask("words for bad weather", tokens)) for tokens in FRAGMENTS]
    return [engine.encode(p.text, p.slots) for p in prompts]


def plain(engine: Engine, ids: list[int]) -> torch.Tensor:
    """Log probabilities (T, V) from one forward pass without cache or company."""
    with torch.inference_mode():
        return engine.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)


def test_slots_equal_a_plain_forward_pass(engine: Engine) -> None:
    prompts = slot_prompts(engine)
    read = engine.read(prompts, top=400)
    for prompt, found in zip(prompts, read, strict=True):
        reference = plain(engine, prompt.ids)
        assert sorted(found) == prompt.slots
        for at in prompt.slots:
            assert found[at].logprob == pytest.approx(float(reference[at - 1, prompt.ids[at]]), abs=1e-4)
            likeliest = int(reference[at - 1].argmax())
            text = engine.tokenizer.decode([likeliest])
            assert found[at].top[text] >= float(reference[at - 1].max()) - 1e-4
            assert sum(torch.tensor(list(found[at].top.values())).exp()) == pytest.approx(1.0, abs=1e-4)


@pytest.fixture(scope="module")
def rounding(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The same model in bfloat16, where the shape of a computation shows in its last digits."""
    return Engine.load(tiny_model(tmp_path_factory.mktemp("rounding")), "bfloat16")


def test_an_answer_depends_on_its_prompt_alone(rounding: Engine) -> None:
    prompts = slot_prompts(rounding)
    assert len({tuple(p.ids[: p.head]) for p in prompts}) == 1
    assert prompts[0].head > 100  # otherwise no piece is kept and nothing is tested here
    expected = [Engine(rounding.model, rounding.tokenizer, kept_tokens=0).read([p], 5)[0] for p in prompts]
    said = [Engine(rounding.model, rounding.tokenizer, kept_tokens=0).generate([p], 6, top=3)[0] for p in prompts]
    keeping = Engine(rounding.model, rounding.tokenizer)
    for order in ([0, 1, 2], [2, 0], [1], [0, 2, 1]):
        assert keeping.read([prompts[i] for i in order], 5) == [expected[i] for i in order]
        assert keeping.generate([prompts[i] for i in order], 6, top=3) == [said[i] for i in order]
    assert len(keeping._kept) == 1


def test_groups_of_any_size_say_the_same(rounding: Engine) -> None:
    texts = [f"the quick brown fox {'jumps over ' * n}" for n in range(11)]  # more than one group
    assert len(texts) > ROWS
    prompts = [rounding.encode(text) for text in texts]
    together = rounding.generate(prompts, 8, top=3)
    assert together == [rounding.generate([prompt], 8, top=3)[0] for prompt in prompts]
    assert together == rounding.generate(prompts[::-1], 8, top=3)[::-1]


def test_the_first_piece_ends_at_the_last_blank_line_before_the_slots(engine: Engine) -> None:
    text = "the fox\n\nthe dog\n\nrain of\tunknown\n\nsnow"
    prompt = engine.encode(text, [text.index("\t") + 1])
    assert engine.tokenizer.decode(prompt.ids[: prompt.head]) == "the fox\n\nthe dog\n\n"
    assert engine.encode("the fox jumps").head == 0


def test_first_pieces_least_recently_used_are_dropped(engine: Engine) -> None:
    small = Engine(engine.model, engine.tokenizer, kept_tokens=12)
    heads = ["the quick\n\n", "rain of\n\n", "snow\n\n"]
    for head in heads:
        small.generate([small.encode(f"{head}the dog")], 1)
    assert 0 < sum(map(len, small._kept)) <= 12
    assert tuple(small.encode(f"{heads[-1]}the dog").ids[: small.encode(f"{heads[-1]}the dog").head]) in small._kept


def test_every_position_is_read_without_slots(engine: Engine) -> None:
    prompt = engine.encode("the lazy dog and the fox")
    found = engine.read([prompt], 1, every=True)[0]
    reference = plain(engine, prompt.ids)
    assert sorted(found) == list(range(1, len(prompt.ids)))
    assert all(found[at].logprob == pytest.approx(float(reference[at - 1, prompt.ids[at]]), abs=1e-4) for at in found)


def test_slots_are_token_boundaries_whatever_the_tokenizer_merges(engine: Engine) -> None:
    text = "unknown unknown"
    assert len(engine.encode(text).ids) < len(engine.encode(text, [3]).ids)  # "unknown" is one token unless it is cut
    prompt = engine.encode(text, [3, 9])
    assert [prompt.offsets[at] for at in prompt.slots] == [3, 9]
    assert engine.tokenizer.decode(prompt.ids) == text


@pytest.mark.parametrize("slots", [[0], [3, 3], [5, 3], [7], [99]])
def test_slots_outside_the_prompt_are_refused(engine: Engine, slots: list[int]) -> None:
    with pytest.raises(BadRequest):
        engine.encode("unknown", slots)


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_generation_in_company_equals_generation_alone(engine: Engine, temperature: float) -> None:
    texts = ["the quick", "the quick brown fox jumps over the lazy dog because", "a", "the quick brown"]
    prompts = [engine.encode(text) for text in texts]
    together = engine.generate(prompts, 12, temperature=temperature, seed=5, top=3)
    for prompt, answer in zip(prompts, together, strict=True):
        alone = engine.generate([prompt], 12, temperature=temperature, seed=5, top=3)[0]
        assert (alone.ids, alone.finish) == (answer.ids, answer.finish)
        assert [p.logprob for p in alone.positions] == pytest.approx([p.logprob for p in answer.positions], abs=1e-4)


def test_greedy_generation_follows_the_plain_argmax(engine: Engine) -> None:
    prompt = engine.encode("the quick brown fox")
    ids = list(prompt.ids)
    for _ in range(8):
        ids.append(int(plain(engine, ids)[-1].argmax()))
    assert engine.generate([engine.encode("of"), prompt], 8)[1].ids == ids[len(prompt.ids) :]


def test_another_seed_samples_another_text(engine: Engine) -> None:
    prompt = engine.encode("the quick")
    texts = {engine.generate([prompt], 12, temperature=1.0, seed=seed)[0].text for seed in range(4)}
    assert len(texts) > 1


def test_generation_stops_before_the_stop_word(engine: Engine) -> None:
    prompt = engine.encode("the quick brown fox")
    whole = engine.generate([prompt], 12)[0].text
    word = whole[3:5]
    cut = engine.generate([prompt], 12, stop=[word])[0]
    assert cut.text == whole[: whole.find(word)]
    assert cut.finish == "stop"


def test_a_prompt_beyond_the_context_is_refused(tmp_path: Path) -> None:
    small = Engine.load(tiny_model(tmp_path, context=64), "float32")
    with pytest.raises(BadRequest, match="maximum context length is 64") as caught:
        small.encode("the quick brown fox jumps over the lazy dog " * 16)
    assert caught.value.code == "context_length_exceeded"
    fits = small.encode("the fox")
    with pytest.raises(BadRequest):
        small.encode("the fox", room=65 - len(fits.ids))


def test_tokens_that_the_model_does_not_have_are_refused_and_never_read(engine: Engine) -> None:
    """A tokenizer with one token more than the model: the extra token is an error of the prompt, not of the server."""
    rows = engine.vocabulary
    tokenizer = copy.deepcopy(engine.tokenizer)
    tokenizer.add_tokens([f"<more{number}>" for number in range(rows - len(tokenizer) + 1)])
    more = f"<more{rows - len(engine.tokenizer)}>"
    assert tokenizer.convert_tokens_to_ids(more) == rows
    own = Engine(engine.model, tokenizer)
    with pytest.raises(BadRequest, match=f"token {rows} of the prompt, and the model has {rows}"):
        own.encode(f"rain {more}")
    plain_prompt = own.encode("rain")
    (found,) = own.generate([plain_prompt], 1, top=2, candidates=["0", more])
    assert "0" in found.positions[0].top and more not in found.positions[0].top


def test_a_tokenizer_that_changes_a_text_in_pieces_is_refused(tmp_path: Path, engine: Engine) -> None:
    folder = tiny_model(tmp_path / "model")
    Engine(engine.model, byte_level(300, eos_token="<end>")).check_pieces()
    with pytest.raises(ValueError, match="changes a text"):
        Engine(engine.model, space_before(330)).check_pieces()
    space_before(330).save_pretrained(folder)
    with pytest.raises(ValueError, match="changes a text"):
        Engine.load(folder, "float32")
