"""The local backend: its answers against plain forward passes, what it refuses, and that closing it frees the model."""

from __future__ import annotations

import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from judge_fakes import tiny_model

from evalkit.errors import JudgeSetupError
from evalkit.judges.backends.engine import Engine
from evalkit.judges.backends.local import LocalBackend
from evalkit.judges.base import JUDGES, SimulateTask
from evalkit.judges.config import JudgeConfig
from evalkit.judges.requests import Failed, Request
from evalkit.util.progress import Progress

TEXT = "Detector: years\nin\tunknown\n 1921\tunknown\n"
SLOTS = [place + 1 for place, character in enumerate(TEXT) if character == "\t"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), context=128)


def opened(folder: Path) -> LocalBackend:
    made = LocalBackend("tiny", lambda: folder, "float32", Progress(quiet=True))
    made.open()
    return made


@pytest.fixture(scope="module")
def backend(folder: Path) -> Iterator[LocalBackend]:
    made = opened(folder)
    yield made
    made.close()


def engine_of(backend: LocalBackend) -> Engine:
    assert backend.engine is not None
    return backend.engine


def asked(backend: LocalBackend, **body: Any) -> dict[str, Any]:
    return backend.complete(Request("/completions", {"model": "tiny", **body})).body


def test_slots_equal_a_plain_forward_pass(backend: LocalBackend) -> None:
    engine = engine_of(backend)
    answer = asked(backend, prompt=[TEXT, TEXT], max_tokens=0, echo=True, logprobs=5, slots=[SLOTS, SLOTS[1:]])
    prompt = engine.encode(TEXT, SLOTS)
    with torch.inference_mode():
        reference = engine.model(torch.tensor([prompt.ids])).logits[0].log_softmax(-1)
    for choice, slots in zip(answer["choices"], (SLOTS, SLOTS[1:]), strict=True):
        logprobs = choice["logprobs"]
        assert "".join(logprobs["tokens"]) == TEXT
        given = [at for at, top in zip(logprobs["text_offset"], logprobs["top_logprobs"], strict=True) if top is not None]
        assert given == slots
    logprobs = answer["choices"][0]["logprobs"]
    for slot, at in zip(SLOTS, prompt.slots, strict=True):
        place = logprobs["text_offset"].index(slot)
        likeliest = engine.tokenizer.decode([int(reference[at - 1].argmax())])
        if "\ufffd" not in likeliest:  # tokens that are no whole characters read alike and are added up
            assert logprobs["top_logprobs"][place][likeliest] == pytest.approx(float(reference[at - 1].max()), abs=1e-4)
    assert answer["usage"]["prompt_tokens"] >= 2 * len(prompt.ids) - 1


def test_plain_echo_gives_every_position(backend: LocalBackend) -> None:
    (choice,) = asked(backend, prompt="the fox", max_tokens=0, echo=True, logprobs=2)["choices"]
    tops = choice["logprobs"]["top_logprobs"]
    assert tops[0] is None
    assert all(len(top) == 2 for top in tops[1:])


def test_lists_of_prompts_are_answered_in_order(backend: LocalBackend) -> None:
    prompts = ["the quick", "because the snow and the rain", "fox"]
    together = asked(backend, prompt=prompts, max_tokens=6, temperature=0, logprobs=3)["choices"]
    for prompt, choice in zip(prompts, together, strict=True):
        (alone,) = asked(backend, prompt=prompt, max_tokens=6, temperature=0)["choices"]
        assert choice["text"] == alone["text"]
        assert len(choice["logprobs"]["top_logprobs"]) == len(choice["logprobs"]["tokens"])
    assert [choice["index"] for choice in together] == [0, 1, 2]


def test_a_slot_outside_the_prompt_is_refused(backend: LocalBackend) -> None:
    with pytest.raises(Failed, match="inside the prompt") as caught:
        asked(backend, prompt="ab", echo=True, max_tokens=0, slots=[[2]], logprobs=1)
    assert caught.value.trouble.kind == "request"


def test_a_prompt_beyond_the_context_is_the_prompts_fault(backend: LocalBackend) -> None:
    with pytest.raises(Failed) as caught:
        asked(backend, prompt="the fox " * 200, max_tokens=1)
    assert caught.value.trouble.code == "context_length_exceeded"
    assert caught.value.trouble.kind == "prompt"


def test_too_little_memory_may_pass(backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*arguments: Any, **named: Any) -> None:
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(engine_of(backend), "generate", lacking)
    with pytest.raises(Failed, match="the model failed: can't allocate memory") as caught:
        asked(backend, prompt="the fox", max_tokens=1)
    assert caught.value.trouble.kind == "passing"


def test_candidates_are_given_however_unlikely(backend: LocalBackend) -> None:
    prompt = "the\tunknown\n of\t"
    common = {"prompt": prompt, "max_tokens": 0, "echo": True, "slots": [[len("the\t")]]}
    (choice,) = asked(backend, logprobs=1, candidates=["7", "no single token"], **common)["choices"]
    (top,) = [t for t in choice["logprobs"]["top_logprobs"] if t]
    assert set(top) >= {"7"}
    assert len(top) <= 2
    (plain,) = asked(backend, logprobs=400, **common)["choices"]
    (full,) = [t for t in plain["logprobs"]["top_logprobs"] if t]
    assert top["7"] == pytest.approx(full["7"], abs=1e-4)


def test_closing_the_judge_frees_the_weights(tmp_path: Path, folder: Path) -> None:
    config = JudgeConfig(provider="local", model=str(folder), dtype="float32")
    with JUDGES.get("local")(config, tmp_path, Progress(quiet=True)) as judge:
        assert judge.simulate([SimulateTask("rain", ["a"])])[0].status == "failed"  # the context is too short: it is loaded
        weights = engine_of(judge.transport.backend).model.get_input_embeddings().weight
        tensor, storage = weakref.ref(weights), weakref.ref(weights.untyped_storage())
        del weights
        assert tensor() is not None
    assert tensor() is None
    assert storage() is None


def test_closing_breaks_off_a_computation(folder: Path) -> None:
    backend = opened(folder)
    computing, closing = threading.Event(), threading.Event()

    def first_layer(*arguments: Any) -> None:
        computing.set()
        closing.wait()

    engine_of(backend).model.get_input_embeddings().register_forward_pre_hook(first_layer)
    raised: list[BaseException] = []

    def compute() -> None:
        try:
            asked(backend, prompt="the fox", max_tokens=50)
        except JudgeSetupError as error:
            raised.append(error)

    thread = threading.Thread(target=compute)
    thread.start()
    computing.wait()
    ending = threading.Thread(target=backend.close)
    ending.start()
    while not backend._closed:
        pass
    closing.set()
    ending.join()
    thread.join()
    assert "was closed" in str(raised[0])
    assert backend.engine is None
    backend.open()
    assert backend.engine is None, "a thread that is late loads nothing again"


def test_the_thread_setting_of_the_run_stays(folder: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        backend = opened(folder)
        found: list[int] = []
        engine_of(backend).model.register_forward_pre_hook(lambda *_: found.append(torch.get_num_threads()))
        engine_of(backend).model.base_model.register_forward_pre_hook(lambda *_: found.append(torch.get_num_threads()))
        thread = threading.Thread(target=lambda: asked(backend, prompt="the fox", max_tokens=1))
        thread.start()
        thread.join()
        backend.close()
        assert torch.get_num_threads() == 1
        assert found and set(found) == {1}
    finally:
        torch.set_num_threads(before)


INTERRUPTED = """
import signal, sys, threading
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
from evalkit.judges.base import JUDGES, Example, ExplainTask
from evalkit.judges.config import JudgeConfig
from evalkit.util.progress import Progress
config = JudgeConfig(provider="local", model=sys.argv[1], dtype="float32", explanation_tokens=10**5)
with JUDGES.get("local")(config, Path(sys.argv[2]), Progress(quiet=True)) as judge:
    judge.transport.backend.open()
    engine = judge.transport.backend.engine
    engine._ends = set()
    told = []
    def hook(*arguments):
        if not told:
            told.append(1)
            print("computing", flush=True)
    engine.model.base_model.register_forward_pre_hook(hook)
    judge.explain([ExplainTask([Example(["a"], [1.0])])])
"""


def test_an_interrupt_ends_a_computation_in_order(tmp_path: Path) -> None:
    """The process ends by KeyboardInterrupt, not by a crash of a thread that still computes."""
    import signal

    model = tiny_model(tmp_path / "model", context=10**6)
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(model), str(tmp_path / "calls")], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"computing\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode in (1, -signal.SIGINT)
    assert errors.decode().strip().endswith("KeyboardInterrupt")
