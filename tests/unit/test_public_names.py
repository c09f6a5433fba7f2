"""The public surface is what ``__all__`` says, sorted, and light to import."""

import subprocess
import sys

import evalkit


def test_every_public_name_is_there_and_sorted():
    assert list(evalkit.__all__) == sorted(evalkit.__all__)
    for name in evalkit.__all__:
        assert getattr(evalkit, name) is not None
    assert set(evalkit._HOME) == set(evalkit.__all__)


def test_importing_evalkit_loads_no_model_stack():
    code = "import sys, evalkit; print('transformer_lens' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
