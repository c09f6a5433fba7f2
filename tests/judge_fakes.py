"""What the judge tests share: a tiny random model in a folder, and an endpoint that misbehaves on demand."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

TEXT = (
    "The quick brown fox jumps over the lazy dog. A detector looks for one thing in text: years, reasons, weather. "
    "unknown 0 1 2 3 4 5 6 7 8 9 rain snow storms because since 1848 1921 Detector: the\tunknown\n of\tunknown\n"
)


def tiny_model(folder: Path, context: int = 2048) -> Path:
    """A random two-layer llama and a byte-level tokenizer trained on a few sentences, saved to ``folder``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


Answer = tuple[int, dict[str, str], bytes]
"""Status, headers and body."""


class Endpoint:
    """A local endpoint: counts requests and answers each as ``script(number, path, body)`` says, GET as ``get(path)`` says."""

    def __init__(self, script: Callable[[int, str, dict[str, Any]], Answer], get: Callable[[str], Answer]) -> None:
        self.script = script
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []
        lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    endpoint.bodies.append(body)
                    endpoint.keys.append(self.headers.get("Authorization", ""))
                    number = len(endpoint.bodies)
                self._answer(endpoint.script(number, self.path, body))

            def do_GET(self) -> None:
                self._answer(get(self.path))

            def _answer(self, answer: Answer) -> None:
                status, headers, data = answer
                try:
                    self.send_response(status)
                    for name, value in {"Content-Type": "application/json", **headers}.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    @property
    def requests(self) -> int:
        return len(self.bodies)


@contextmanager
def endpoint(
    script: Callable[[int, str, dict[str, Any]], Answer], get: Callable[[str], Answer] = lambda path: error(404)
) -> Iterator[Endpoint]:
    fake = Endpoint(script, get)
    thread = threading.Thread(target=fake.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        fake.server.shutdown()
        fake.server.server_close()


def ok(body: Any) -> Answer:
    return 200, {}, json.dumps(body).encode()


def error(status: int, message: str = "no", headers: dict[str, str] | None = None, code: str | None = None) -> Answer:
    return status, headers or {}, json.dumps({"error": {"message": message, "type": "x", "param": None, "code": code}}).encode()


def prompts_of(body: dict[str, Any]) -> list[str]:
    return [body["prompt"]] if isinstance(body["prompt"], str) else body["prompt"]


def echoed(prompt: str, digit: str = "3", digit_logprob: float = -0.1) -> dict[str, Any]:
    """One choice of a server with echo and logprobs whose tokens are lines cut at the tabs: ``digit`` behind every tab."""
    offsets = [0] + [place + 1 for place, character in enumerate(prompt) if character == "\t"]
    tops: list[dict[str, float] | None] = [None] + [{digit: digit_logprob, "x": -4.0} for _ in offsets[1:]]
    ends = [*offsets[1:], len(prompt)]
    return {
        "text": prompt,
        "logprobs": {
            "tokens": [prompt[a:b] for a, b in zip(offsets, ends, strict=True)],
            "token_logprobs": [None] + [-1.0] * (len(offsets) - 1),
            "top_logprobs": tops,
            "text_offset": offsets,
        },
    }


def completions(number: int, path: str, body: dict[str, Any]) -> Answer:
    """A healthy completions endpoint: explanations and echoed logprobs; 100 tokens of usage for each prompt."""
    prompts = prompts_of(body)
    make = (lambda p: echoed(p)) if body.get("echo") else (lambda p: {"text": " words about rain\n"})
    choices = [{"index": index, **make(prompt)} for index, prompt in enumerate(prompts)]
    usage = {"prompt_tokens": 100 * len(prompts), "completion_tokens": 5 * len(prompts) * (not body.get("echo"))}
    return ok({"choices": choices, "usage": usage})


def hang(until: threading.Event) -> Answer:
    """Answer too late: no earlier than ``until`` is set."""
    until.wait()
    return ok({"choices": []})
