"""A stranger's model folder: read or refused with the reason, whatever is wrong with it; nothing of it runs, nothing is asked."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from judge_fakes import tiny_model
from tokenizers_case import byte_level
from transformers import BertConfig, BertLMHeadModel, Gemma3Config, Gemma3ForConditionalGeneration

from evalkit.errors import ModelError, SuiteError
from evalkit.judges.backends.engine import Engine
from evalkit.models.language_model import LanguageModel, ModelConfig
from evalkit.models.pretrained import seam
from evalkit.util.progress import Progress

QUIET = Progress(quiet=True)
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "model", context=64)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def change(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def load(folder: Path, **more) -> LanguageModel:
    return LanguageModel.load(ModelConfig(path=str(folder), **more), QUIET)


def test_no_code_of_a_folder_runs_and_nothing_is_asked(folder, tmp_path, monkeypatch):
    def asked(*prompt: str) -> str:
        raise AssertionError(f"asked on standard input: {prompt}")

    monkeypatch.setattr("builtins.input", asked)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'w')\nfrom transformers import LlamaConfig as C\n")
    change(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    for read in (load, lambda folder: load(folder, random_weights=True), Engine.load):
        with pytest.raises(ModelError, match="needs code of its own, which evalkit never runs"):
            read(folder)
    assert not (tmp_path / "RAN").exists()


def test_a_tokenizer_with_code_of_its_own_is_refused_too(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    change(folder / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]})
    with pytest.raises(ModelError, match="tokenizer cannot be loaded: it needs code of its own"):
        load(folder)


@pytest.mark.parametrize(
    "quantisation",
    [
        {"quant_method": "gptq", "bits": 4, "group_size": 32},
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    ],
    ids=lambda q: q["quant_method"],
)
def test_weights_that_need_what_is_not_installed_are_refused_with_the_reason(folder, quantisation):
    change(folder / "config.json", quantization_config=quantisation)
    with pytest.raises(ModelError, match="the model cannot be loaded: .") as caught:
        load(folder)
    assert caught.value.where == str(folder) and caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", b"\x10\x00"),
        ("config.json", b"[]"),
        ("config.json", b'{"model_type": "llama", "hidden_size": "wide"}'),
        ("config.json", b'{"model_type": "of-nobody"}'),
        ("config.json", b'{"model_type": "t5"}'),
        ("tokenizer.json", b"{"),
    ],
)
def test_damaged_and_unknown_folders_are_refused(folder, file, content):
    (folder / file).write_bytes(content)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(folder)


def test_a_folder_without_a_tokenizer_is_refused(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="the tokenizer"):
        load(folder)


def test_a_model_that_sees_the_future_is_refused(tmp_path):
    tokenizer = byte_level(eos_token="<end>")
    # weights so large that the leak, 65 % of the change, is beyond the rounding of a processor's bfloat16 too
    for decoder in (False, True):
        folder = tmp_path / str(decoder)
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(tokenizer), max_position_embeddings=64, is_decoder=decoder, initializer_range=0.2, **SIZES
        )
        BertLMHeadModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for read in (load, Engine.load):
        with pytest.raises(ModelError, match="sees the future"):
            read(tmp_path / "False")
    assert Engine.load(tmp_path / "True").context == 64, "the same model as a decoder"


def test_sizes_one_level_down_in_the_config_are_found_and_nothing_is_installed(tmp_path, monkeypatch):
    tokenizer = byte_level(eos_token="<end>")
    text = {"vocab_size": len(tokenizer), "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, **SIZES}
    seen = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    config = Gemma3Config(text_config=text, vision_config=seen | {"patch_size": 14}, mm_tokens_per_image=4)
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: started.append(command))
    model = load(tmp_path)
    assert started == [], "TransformerLens would install torchvision for a processor of images"
    assert (model.d_model, model.n_layers, model.context, model.n_vocab) == (32, 2, 64, len(tokenizer))
    assert model.activations(torch.tensor([[1, 2, 3]]), "blocks.1.hook_resid_post").shape == (1, 3, 32)
    assert Engine.load(tmp_path).context == 64


def test_the_seam_gives_the_librarys_first_line_and_lets_our_own_errors_pass():
    for error, said in ((KeyError("lacks"), "'lacks'"), (ImportError("\n a: \n b\n c"), "a: b"), (MemoryError(), "MemoryError")):
        with pytest.raises(ModelError) as caught, seam("it failed", "there", "do this"):
            raise error
        assert caught.value.what == f"it failed: {said}" and caught.value.__cause__ is error
    with pytest.raises(SuiteError), seam("it failed", "there", "do this"):
        raise SuiteError("own")
    with pytest.raises(KeyboardInterrupt), seam("it failed", "there", "do this"):
        raise KeyboardInterrupt


def test_a_method_of_quantising_that_nobody_knows_is_refused(folder: Path) -> None:
    change(folder / "config.json", quantization_config={"quant_method": "own_bits", "bits": 3})
    with pytest.raises(ModelError, match="quantised by 'own_bits'"):
        load(folder)
