"""GGUF to Hugging Face folder: a tiny model is written to a GGUF file by hand, as llama.cpp lays it out, and must come back."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from evalkit.errors import ModelError
from evalkit.models import gguf as module
from evalkit.models.gguf import prepare
from evalkit.util.progress import Progress

gguf = pytest.importorskip("gguf")
QUIET = Progress(quiet=True)
SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from halves (first half, second half) to pairs (first, second, first, ...)."""
    out = np.empty_like(weight)
    size = len(weight) // heads
    for head in range(heads):
        rows = weight[head * size : (head + 1) * size]
        out[head * size : (head + 1) * size : 2] = rows[: size // 2]
        out[head * size + 1 : (head + 1) * size : 2] = rows[size // 2 :]
    return out


def tiny(kind: str) -> LlamaForCausalLM | Qwen2ForCausalLM:
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=rope, tie_word_embeddings=True))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES, rope_parameters=rope, tie_word_embeddings=False))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def write(path: Path, model: torch.nn.Module, kind: str, quantised: bool = False) -> None:
    """``model`` as a GGUF file. ``quantised`` stores the feed-forward matrices as Q8_0."""
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(2)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    byte_names = byte_characters()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|endoftext|>", *byte_names, "th", "the", "\u0120the"])
    writer.add_token_types([3] + [1] * 259)
    writer.add_token_merges(["t h", "th e", "\u0120 the"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for name, tensor in model.state_dict().items():
        data = tensor.numpy()
        if name.startswith("model.layers."):
            _, _, layer, *middle, suffix = name.split(".")
            stem = NAMES[".".join(middle)]
            if kind == "llama" and stem in ("attn_q", "attn_k"):
                data = pairs(data, 4 if stem == "attn_q" else 2)
            if quantised and stem.startswith("ffn_") and data.ndim == 2:
                packed = gguf.quantize(data, gguf.GGMLQuantizationType.Q8_0)
                writer.add_tensor(f"blk.{layer}.{stem}.{suffix}", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
                continue
            writer.add_tensor(f"blk.{layer}.{stem}.{suffix}", data)
        elif name != "lm_head.weight" or kind == "qwen2":
            other = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
            writer.add_tensor(other.get(name, "output.weight"), data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def byte_characters() -> list[str]:
    """The 256 characters that stand for bytes in byte-level vocabularies."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_weights_come_back_exactly(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 300)
    model = tiny(kind)
    write(tmp_path / "tiny.gguf", model, kind)
    folder = prepare(tmp_path / "tiny.gguf", tmp_path / "prepared", torch.float32, QUIET)
    assert folder.name.endswith("-float32") and folder.parent == tmp_path / "prepared"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = AutoModelForCausalLM.from_pretrained(folder)
    state = again.state_dict()
    assert set(state) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    tokens = torch.arange(20)[None] * 7 % 260
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=0, atol=1e-5)


def test_quantised_tensors_match_the_reference_dequantiser_in_bfloat16(tmp_path: Path) -> None:
    model = tiny("llama")
    write(tmp_path / "tiny.gguf", model, "llama", quantised=True)
    folder = prepare(tmp_path / "tiny.gguf", tmp_path, torch.bfloat16, QUIET)
    state = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    name = "model.layers.1.mlp.down_proj.weight"
    kind = gguf.GGMLQuantizationType.Q8_0
    expected = gguf.dequantize(gguf.quantize(model.state_dict()[name].numpy(), kind), kind)
    assert torch.equal(state[name], torch.from_numpy(expected).bfloat16())
    assert state["model.norm.weight"].dtype == torch.bfloat16


def test_tokenizer_comes_along_and_digits_stand_alone(tmp_path: Path) -> None:
    write(tmp_path / "tiny.gguf", tiny("llama"), "llama")
    folder = prepare(tmp_path / "tiny.gguf", tmp_path, torch.float32, QUIET)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the the 12", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["the", "\u0120the", "\u0120", "1", "2"]


def test_prepared_once_and_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "tiny.gguf", tiny("llama"), "llama")
    monkeypatch.setattr(module, "_save_tokenizer", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "tiny.gguf", tmp_path / "prepared", torch.float32, QUIET)
    assert not list((tmp_path / "prepared").iterdir())
    monkeypatch.undo()
    folder = prepare(tmp_path / "tiny.gguf", tmp_path / "prepared", torch.float32, QUIET)
    monkeypatch.setattr(module, "_write", lambda *a: pytest.fail("prepared twice"))
    assert prepare(tmp_path / "tiny.gguf", tmp_path / "prepared", torch.float32, QUIET) == folder


def test_refusals(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "gemma.gguf", "gemma2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="'gemma2' cannot be prepared; supported: llama, qwen2"):
        prepare(tmp_path / "gemma.gguf", tmp_path, torch.float32, QUIET)
    (tmp_path / "text.gguf").write_bytes(b"this is no model" * 20)
    with pytest.raises(ModelError, match="not a whole GGUF"):
        prepare(tmp_path / "text.gguf", tmp_path, torch.float32, QUIET)
    with pytest.raises(ModelError, match="no such GGUF"):
        prepare(tmp_path / "absent.gguf", tmp_path, torch.float32, QUIET)
    write(tmp_path / "tiny.gguf", tiny("llama"), "llama")
    data = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="not a whole GGUF"):
        prepare(tmp_path / "cut.gguf", tmp_path, torch.float32, QUIET)
    (tmp_path / "lacks.gguf").write_bytes(data.replace(b"token_embd.weight", b"token_embx.weight"))
    with pytest.raises(ModelError, match="not a whole GGUF"):
        prepare(tmp_path / "lacks.gguf", tmp_path, torch.float32, QUIET)
    with pytest.raises(ModelError, match="float64"):
        prepare(tmp_path / "tiny.gguf", tmp_path, torch.float64, QUIET)
