"""The local server over HTTP, asked by the real openai client; and the child process that must not outlive its parent."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import httpx
import openai
import pytest
import torch
from judge_fakes import tiny_model

from evalkit.judges.engine import Engine
from evalkit.judges.server import KEY_VARIABLE, Service, handler

TEXT = "Detector: years\nin\tunknown\n 1921\tunknown\n"
SLOTS = [place + 1 for place, character in enumerate(TEXT) if character == "\t"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), context=128)


@pytest.fixture(scope="module")
def service(folder: Path) -> Service:
    return Service(Engine.load(folder, "float32"), "tiny", "secret")


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(service))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{url}/v1", api_key="secret", max_retries=0, http_client=openai.DefaultHttpxClient(trust_env=False)
    ) as made:
        yield made


def test_slots_over_http_equal_a_plain_forward_pass(client: openai.OpenAI, service: Service) -> None:
    answer = client.completions.create(
        model="tiny", prompt=[TEXT, TEXT], max_tokens=0, echo=True, logprobs=5, extra_body={"slots": [SLOTS, SLOTS[1:]]}
    )
    prompt = service.engine.encode(TEXT, SLOTS)
    with torch.inference_mode():
        reference = service.engine.model(torch.tensor([prompt.ids])).logits[0].log_softmax(-1)
    for choice, slots in zip(answer.choices, (SLOTS, SLOTS[1:]), strict=True):
        said = choice.logprobs
        assert said is not None
        assert "".join(said.tokens or []) == TEXT
        given = [offset for offset, top in zip(said.text_offset or [], said.top_logprobs or [], strict=True) if top is not None]
        assert given == slots
    said = answer.choices[0].logprobs
    for slot, at in zip(SLOTS, prompt.slots, strict=True):
        place = said.text_offset.index(slot)
        assert said.token_logprobs[place] == pytest.approx(float(reference[at - 1, prompt.ids[at]]), abs=1e-4)
        likeliest = service.engine.tokenizer.decode([int(reference[at - 1].argmax())])
        if "\ufffd" not in likeliest:  # tokens that are no whole characters read alike and are added up
            assert said.top_logprobs[place][likeliest] == pytest.approx(float(reference[at - 1].max()), abs=1e-4)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens >= 2 * len(prompt.ids) - 1


def test_plain_echo_gives_every_position(client: openai.OpenAI) -> None:
    said = client.completions.create(model="tiny", prompt="the fox", max_tokens=0, echo=True, logprobs=2).choices[0].logprobs
    assert said.top_logprobs[0] is None
    assert all(len(top) == 2 for top in said.top_logprobs[1:])


def test_lists_of_prompts_are_answered_in_order(client: openai.OpenAI) -> None:
    prompts = ["the quick", "because the snow and the rain", "fox"]
    together = client.completions.create(model="tiny", prompt=prompts, max_tokens=6, temperature=0, logprobs=3)
    for prompt, choice in zip(prompts, together.choices, strict=True):
        alone = client.completions.create(model="tiny", prompt=prompt, max_tokens=6, temperature=0).choices[0]
        assert choice.text == alone.text
        assert len(choice.logprobs.top_logprobs) == len(choice.logprobs.tokens)
    assert [choice.index for choice in together.choices] == [0, 1, 2]


def test_the_model_is_listed(client: openai.OpenAI, url: str) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    health = httpx.get(f"{url}/health", headers={"Authorization": "Bearer secret"}, trust_env=False)
    assert health.json() == {"status": "ok"}


@pytest.mark.parametrize("key", ["", "wrong"])
def test_without_the_key_nothing_is_served(url: str, key: str) -> None:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    for path in ("/health", "/v1/models"):
        assert httpx.get(url + path, headers=headers, trust_env=False).status_code == 401
    answer = httpx.post(f"{url}/v1/completions", headers=headers, json={"prompt": "x"}, trust_env=False)
    assert answer.status_code == 401


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[]", "JSON object"),
        (b"{}", "prompt must be"),
        (b'{"prompt": ""}', "prompt must be"),
        (b'{"prompt": ["a", 3]}', "prompt must be"),
        (b'{"prompt": "a", "max_tokens": -1}', "max_tokens"),
        (b'{"prompt": "a", "max_tokens": 1.5}', "max_tokens"),
        (b'{"prompt": "a", "max_tokens": 0}', "echo"),
        (b'{"prompt": "a", "echo": true, "max_tokens": 0, "slots": [[1], [1]], "logprobs": 1}', "one list"),
        (b'{"prompt": "ab", "echo": true, "max_tokens": 0, "slots": [[2]], "logprobs": 1}', "inside the prompt"),
        (b'{"prompt": "a", "stop": 3}', "stop"),
        (b'{"prompt": "a", "n": 2}', "n is not supported"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature"),
    ],
)
def test_bad_requests_are_named(url: str, body: bytes, words: str) -> None:
    headers = {"Authorization": "Bearer secret"}
    answer = httpx.post(f"{url}/v1/completions", headers=headers, content=body, trust_env=False)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_a_prompt_beyond_the_context_is_a_400(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="the fox " * 200, max_tokens=1)
    assert caught.value.code == "context_length_exceeded"


PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-m", "evalkit.judges.server", "--model", sys.argv[1], "--dtype", "float32"],
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
print(child.pid, child.stdout.readline().decode(), flush=True)
time.sleep(600)
"""


def test_the_server_dies_with_a_killed_parent(folder: Path) -> None:
    environment = {**os.environ, KEY_VARIABLE: "secret"}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(folder)], stdout=subprocess.PIPE, env=environment)
    assert parent.stdout is not None
    pid, ready = parent.stdout.readline().decode().split(" ", 1)
    url = json.loads(ready)["address"]
    headers = {"Authorization": "Bearer secret"}
    assert httpx.get(f"{url}/models", headers=headers, trust_env=False).status_code == 200
    server = os.pidfd_open(int(pid))  # it can be read from when the process ends, which is no child of this one
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    select.select([server], [], [])
    os.close(server)
    with pytest.raises(httpx.TransportError):  # refused, or reset where the port was only just closed
        httpx.get(f"{url}/models", headers=headers, trust_env=False)


def test_the_server_wants_a_key_in_its_environment(folder: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
    ended = subprocess.run(
        [sys.executable, "-m", "evalkit.judges.server", "--model", str(folder)], env=environment, capture_output=True, check=False
    )
    assert ended.returncode == 2
    assert KEY_VARIABLE in ended.stderr.decode()


def test_candidates_are_given_however_unlikely(client: openai.OpenAI) -> None:
    prompt = "the\tunknown\n of\t"
    asked = {"slots": [[len("the\t")]], "candidates": ["7", "no single token"]}
    (choice,) = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=0, echo=True, logprobs=1, extra_body=asked
    ).choices
    (top,) = [t for t in choice.logprobs.top_logprobs if t]
    assert set(top) >= {"7"}
    assert len(top) <= 2
    (plain,) = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=0, echo=True, logprobs=400, extra_body={"slots": asked["slots"]}
    ).choices
    (full,) = [t for t in plain.logprobs.top_logprobs if t]
    assert top["7"] == pytest.approx(full["7"], abs=1e-4)
