"""llama.cpp's own server, from the wheel ``xllamacpp``, in a child process: ``python llama_server.py MODEL.gguf [--slots N]``.

1. The key is read from the environment variable LLAMA_KEY, a free port of 127.0.0.1 is taken.
2. One line of JSON says where it listens: {"address": ...}.
3. It ends when its standard input ends, so no server outlives the test that started it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

KEY = "LLAMA_KEY"
CONTEXT = 2048
"""Tokens of each slot."""


class Running(NamedTuple):
    """A server that answers."""

    base_url: str
    pid: int


@contextmanager
def llama_server(model: Path, key: str, *, slots: int = 1, threads: int = 2) -> Iterator[Running]:
    """llama.cpp's server of a GGUF file: ``slots`` prompts at once, each with its beginning kept."""
    process = subprocess.Popen(
        [sys.executable, __file__, str(model), "--slots", str(slots), "--threads", str(threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # llama.cpp's log
        env={**os.environ, KEY: key, "OMP_WAIT_POLICY": "passive"},  # threads that wait do not spin: others work here too
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        line = process.stdout.readline()  # ends with the process, if that fails
        if not line:
            raise RuntimeError(f"llama.cpp's server ended with status {process.wait()}")
        yield Running(json.loads(line)["address"] + "/v1", process.pid)
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


def main() -> None:
    """Load, announce, serve until standard input ends."""
    parser = argparse.ArgumentParser(description="Serve one GGUF file by llama.cpp.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    import xllamacpp

    said = os.dup(1)
    os.dup2(2, 1)  # whatever the library prints goes with its log
    params = xllamacpp.CommonParams()
    params.model.path = str(arguments.model)
    # with one memory for all slots, llama.cpp clears slots that are idle for a moment, and their prompts are read again
    params.n_parallel, params.n_ctx, params.kv_unified = arguments.slots, CONTEXT * arguments.slots, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = arguments.threads
    params.api_keys = [os.environ[KEY]]
    params.warmup = False
    server = xllamacpp.Server(params)
    os.write(said, json.dumps({"address": server.listening_address}).encode() + b"\n")
    sys.stdin.buffer.read()
    os._exit(0)  # its threads have no end of their own


if __name__ == "__main__":
    main()
