"""A small OpenAI-compatible completions server around one local model: ``python -m evalkit.judges.server --model FOLDER``.

1. Binds 127.0.0.1 only and wants the key in the environment variable EVALKIT_SERVER_KEY with every request.
2. Prints one line of JSON, {"address": ..., "ready": true}, when the model is loaded.
3. Serves GET /health, GET /v1/models and POST /v1/completions: prompt (one or a list), max_tokens, temperature, stop, seed,
   logprobs (any number of alternatives), echo (with max_tokens 0). One request computes at a time.
4. Extension ``slots``: for each prompt, character offsets at which the distribution of the next token is wanted. Logprobs are
   then given at the tokens that begin there and null elsewhere, and only they are computed. With ``candidates``, a list of
   strings, those that are one token are among the alternatives however unlikely they are.
5. Ends when its standard input ends. The parent holds the other side, so however the parent dies, no server is left behind.
"""

from __future__ import annotations

import argparse
import hmac
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from evalkit.judges.engine import BadRequest, Encoded, Engine, Generated, Position

KEY_VARIABLE = "EVALKIT_SERVER_KEY"
_LARGEST_BODY = 64 << 20


class Completion(NamedTuple):
    """A validated request."""

    prompts: list[str]
    slots: list[list[int]] | None
    candidates: list[str]
    max_tokens: int
    temperature: float
    seed: int
    stop: list[str]
    logprobs: int
    echo: bool


def parse(body: Any) -> Completion:
    """A request from its JSON.

    Raises:
        BadRequest: a field is missing, of the wrong type, or asks for what this server does not do.
    """
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    prompt = body.get("prompt")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) and p for p in prompts):
        raise BadRequest("prompt must be a non-empty string or a list of them")
    slots = body.get("slots")
    if slots is not None and not (
        isinstance(slots, list)
        and len(slots) == len(prompts)
        and all(isinstance(places, list) and all(type(place) is int for place in places) for places in slots)
    ):
        raise BadRequest("slots must hold one list of character offsets for each prompt")
    max_tokens = _number(body, "max_tokens", 16, int, 0)
    echo = bool(body.get("echo", False))
    if echo != (max_tokens == 0):
        raise BadRequest("echo goes with max_tokens = 0, and max_tokens = 0 with echo")
    if slots is not None and not echo:
        raise BadRequest("slots need echo and max_tokens = 0")
    candidates = body.get("candidates") or []
    if not isinstance(candidates, list) or not all(isinstance(word, str) for word in candidates):
        raise BadRequest("candidates must be a list of strings")
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(word, str) and word for word in stop):
        raise BadRequest("stop must be a string or a list of strings")
    for name, only in (("n", 1), ("best_of", 1), ("stream", False), ("suffix", None)):
        if body.get(name) not in (None, only):
            raise BadRequest(f"{name} is not supported")
    return Completion(
        prompts,
        slots,
        candidates,
        max_tokens,
        _number(body, "temperature", 0.0, float, 0),
        _number(body, "seed", 0, int, 0),
        stop,
        _number(body, "logprobs", 0, int, 0),
        echo,
    )


def _number(body: dict[str, Any], name: str, default: Any, kind: type[int] | type[float], least: int) -> Any:
    value: Any = body.get(name)
    if value is None:
        return default
    number = isinstance(value, int) or (kind is float and isinstance(value, float))
    if isinstance(value, bool) or not number or not least <= value < 1 << 62:
        raise BadRequest(f"{name} must be a number of {least} or more")
    return kind(value)


class Service:
    """Requests to answers, one at a time."""

    def __init__(self, engine: Engine, name: str, key: str) -> None:
        self.engine, self.name, self.key = engine, name, key
        self._lock = threading.Lock()

    def complete(self, asked: Completion) -> dict[str, Any]:
        """The body of a completions answer; raises BadRequest."""
        slots = asked.slots or [[]] * len(asked.prompts)
        prompts = [self.engine.encode(p, s, asked.max_tokens) for p, s in zip(asked.prompts, slots, strict=True)]
        generated: list[Generated] = []
        with self._lock:
            if asked.echo:
                read: list[dict[int, Position]] = [{} for _ in prompts]
                if asked.logprobs:
                    read = self.engine.read(prompts, asked.logprobs, asked.slots is None, asked.candidates)
                choices = [self._echo(*each) for each in zip(asked.prompts, prompts, read, strict=True)]
            else:
                generated = self.engine.generate(
                    prompts,
                    asked.max_tokens,
                    temperature=asked.temperature,
                    seed=asked.seed,
                    stop=asked.stop,
                    top=asked.logprobs,
                    candidates=asked.candidates,
                )
                choices = [self._choice(text, answer) for text, answer in zip(asked.prompts, generated, strict=True)]
        usage = {
            "prompt_tokens": sum(len(p.ids) for p in prompts),
            "completion_tokens": sum(len(answer.ids) for answer in generated),
        }
        return {
            "id": f"cmpl-{time.time_ns():x}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.name,
            "choices": [{"index": index, **choice} for index, choice in enumerate(choices)],
            "usage": {**usage, "total_tokens": sum(usage.values())},
        }

    def _echo(self, text: str, prompt: Encoded, read: dict[int, Position]) -> dict[str, Any]:
        ends = [*prompt.offsets[1:], len(text)]
        logprobs = {
            "tokens": [text[start:end] for start, end in zip(prompt.offsets, ends, strict=True)],
            "token_logprobs": [read[i].logprob if i in read else None for i in range(len(prompt.ids))],
            "top_logprobs": [read[i].top if i in read else None for i in range(len(prompt.ids))],
            "text_offset": prompt.offsets,
        }
        return {"text": text, "finish_reason": "length", "logprobs": logprobs if read else None}

    def _choice(self, prompt: str, answer: Generated) -> dict[str, Any]:
        logprobs = None
        if answer.positions:  # asked for: at least the end token is there
            tokens = [self.engine.string(token) for token in answer.ids]
            logprobs = {
                "tokens": tokens,
                "token_logprobs": [position.logprob for position in answer.positions],
                "top_logprobs": [position.top for position in answer.positions],
                "text_offset": [len(prompt) + sum(map(len, tokens[:place])) for place in range(len(tokens))],
            }
        return {"text": answer.text, "finish_reason": answer.finish, "logprobs": logprobs}


def handler(service: Service) -> type[BaseHTTPRequestHandler]:
    """The request handler of one service."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """Silence: the parent shows progress."""

        def _answer(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                if status >= 400:  # the body may be unread, so the connection cannot be used again
                    self.send_header("Connection", "close")
                    self.close_connection = True
                self.end_headers()
                self.wfile.write(data)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the client gave up waiting

        def _refuse(self, status: int, message: str, code: str) -> None:
            kind = "invalid_request_error" if status < 500 else "server_error"
            self._answer(status, {"error": {"message": message, "type": kind, "param": None, "code": code}})

        def _allowed(self) -> bool:
            given = self.headers.get("Authorization", "")
            if hmac.compare_digest(given.encode(), f"Bearer {service.key}".encode()):
                return True
            self._refuse(401, "wrong or missing key", "invalid_api_key")
            return False

        def do_GET(self) -> None:
            if not self._allowed():
                return
            if self.path == "/health":
                self._answer(200, {"status": "ok"})
            elif self.path == "/v1/models":
                self._answer(200, {"object": "list", "data": [{"id": service.name, "object": "model", "owned_by": "evalkit"}]})
            else:
                self._refuse(404, f"there is no {self.path}", "not_found")

        def do_POST(self) -> None:
            if not self._allowed():
                return
            if self.path != "/v1/completions":
                self._refuse(404, f"there is no {self.path}", "not_found")
                return
            length = self.headers.get("Content-Length", "")
            if not length.isdigit() or int(length) > _LARGEST_BODY:
                self._refuse(413, "the body is too large or its length is missing", "body_too_large")
                return
            try:
                asked = parse(json.loads(self.rfile.read(int(length))))
                answer = service.complete(asked)
            except BadRequest as error:
                self._refuse(400, str(error), error.code)
            except ValueError as error:
                self._refuse(400, f"the body is not JSON: {error}", "invalid_json")
            except (RuntimeError, MemoryError) as error:
                self._refuse(500, f"the model failed: {error}", "model_failed")
            else:
                self._answer(200, answer)

    return Handler


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(0)


def main() -> None:
    """Load, announce, serve."""
    parser = argparse.ArgumentParser(prog="python -m evalkit.judges.server", description="Serve one local model to evalkit.")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--name", default="", help="name the model is served under (default: the folder's)")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    arguments = parser.parse_args()
    key = os.environ.get(KEY_VARIABLE, "")
    if not key:
        parser.error(f"the environment variable {KEY_VARIABLE} must hold a key")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    service = Service(Engine.load(arguments.model, arguments.dtype), arguments.name or arguments.model.name, key)
    server = ThreadingHTTPServer(("127.0.0.1", arguments.port), handler(service))
    server.daemon_threads = True
    print(json.dumps({"address": f"http://127.0.0.1:{server.server_port}/v1", "ready": True}), flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
