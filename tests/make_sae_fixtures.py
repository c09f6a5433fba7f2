"""Tiny autoencoders in the files of the libraries that write them, with what those libraries compute: ``tests/fixtures/sae``.

Run by a person, in an environment that has the libraries, whenever a fixture is added; the tests read its output only:

    python3.11 -m venv /path/of/env
    /path/of/env/bin/pip install torch==2.13.0 transformer-lens==3.9.0 transformers==5.23.0 simple-parsing einops natsort \
        schedulefree accelerate plotly plotly-express babe nltk python-dotenv tenacity
    /path/of/env/bin/pip install --no-deps sae-lens==6.54.0 dictionary-learning==0.1.0 eai-sparsify==1.3.3
    PYTHONHASHSEED=0 SPARSIFY_DISABLE_TRITON=1 /path/of/env/bin/python tests/make_sae_fixtures.py

The hash seed fixes the order of keys in a few configs of SAELens: with it, a second run changes no byte.

1. A planted set of weights, far from what initialisation gives: decoder norms away from 1, every bias away from 0, thresholds
   above 0. The same numbers go into every library, so that one function stands in several formats.
2. Each SAE is built with its library's own class and saved by its library's own code; dictionary_learning, which saves inside its
   training loop, by the two calls that loop makes. The library then loads its own files and computes the expectations.
3. Inputs go from far away to very near b_dec, so that on some tokens fewer than k pre-activations are positive.
4. ``cases.json`` says of each case what it is; ``WRITER/CASE/expected.safetensors`` holds x, codes = encode(x), decoded =
   decode(codes) and x_hat = forward(x). Libraries that normalise tokens undo it in decode, so that decoded is x_hat there.

Nothing but nnsight and zstandard, which dictionary_learning imports to read models and text, is replaced by an empty module.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

HOME = Path(__file__).parent / "fixtures" / "sae"
D, F, K = 12, 32, 6
GROUPS = [8, 8, 16]
THRESHOLD = 0.35


class Outputs(NamedTuple):
    """What a library computes of an SAE."""

    x: torch.Tensor
    codes: torch.Tensor
    decoded: torch.Tensor
    x_hat: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Case:
    """One fixture."""

    writer: str
    """evalkit's name of the format."""
    name: str
    architecture: str
    """The writer's word for it."""
    path: str
    """What a user would name, inside the case's folder."""
    kind: str = ""
    """evalkit's kind of dictionary; empty where it has to refuse."""
    group: str = ""
    """Cases of one group are one function: one identity."""
    refused: str = ""
    """Words of the message with which evalkit has to refuse it."""


CASES: list[Case] = []


def folder(case: Case) -> Path:
    """Where the files of ``case`` go."""
    home = HOME / case.writer / case.name / case.path
    home.mkdir(parents=True)
    return home


def record(case: Case, outputs: Outputs | None = None) -> None:
    """Keep ``case`` and its expectations."""
    CASES.append(case)
    if outputs is not None:
        assert all(part.isfinite().all() for part in outputs), case
        assert 0 < (outputs.codes != 0).float().mean() < 0.9, case
        tensors = {name: part.detach().float().contiguous().clone() for name, part in outputs._asdict().items()}
        save_file(tensors, HOME / case.writer / case.name / "expected.safetensors")


def weights(d: int = D, f: int = F, seed: int = 1) -> dict[str, torch.Tensor]:
    """The planted weights, by canonical names."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    return {
        "W_enc": normal(d, f) / d**0.5,
        "W_dec": normal(f, d) / d**0.5 * (0.4 + 1.5 * torch.rand(f, 1, generator=g)),
        "b_enc": 0.3 * normal(f) - 0.4,
        "b_dec": 0.5 * normal(d),
        "threshold": 0.1 + 0.4 * torch.rand(f, generator=g),
        "b_gate": 0.3 * normal(f) - 0.2,
        "r_mag": 0.4 * normal(f),
        "b_mag": 0.3 * normal(f) + 0.1,
    }


def inputs(w: dict[str, torch.Tensor], n: int = 20) -> torch.Tensor:
    """Tokens (n, D) from far away to very near b_dec."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(n, len(w["b_dec"]), generator=g) * torch.logspace(0.5, -2, n)[:, None]
    return x + w["b_dec"]


def plant(module: torch.nn.Module, **tensors: torch.Tensor) -> None:
    """Overwrite parameters and buffers of ``module`` by name."""
    found = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.no_grad():
        for name, tensor in tensors.items():
            assert found[name].shape == tensor.shape, (name, found[name].shape, tensor.shape)
            found[name].copy_(tensor)


def few(pre: torch.Tensor) -> None:
    """Check that some tokens have fewer than k positive pre-activations, and some more."""
    counts = (pre > 0).sum(-1)
    assert counts.min() < K < counts.max(), counts


# SAELens


def saelens() -> None:
    """Fixtures of SAELens: inference files, training checkpoints, and configs from before version 6."""
    import sae_lens
    from sae_lens.saes.sae import SAE, SAEMetadata, TrainingSAE
    from sae_lens.training.activation_scaler import ActivationScaler

    where = {"model_name": "gpt2-small", "hook_name": "blocks.8.hook_resid_pre", "context_size": 64, "prepend_bos": True}
    names = {
        "standard": ("W_enc", "W_dec", "b_enc", "b_dec"),
        "gated": ("W_enc", "W_dec", "b_gate", "r_mag", "b_mag", "b_dec"),
        "jumprelu": ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"),
    }

    def build(cls: str, w: dict[str, torch.Tensor], **settings: Any) -> Any:
        settings = {"d_in": len(w["b_dec"]), "d_sae": len(w["b_enc"]), "metadata": SAEMetadata(**where), **settings}
        sae = getattr(sae_lens, cls)(getattr(sae_lens, cls + "Config")(**settings))
        architecture = sae.cfg.architecture()
        tensors = {name: w[name] for name in names.get(architecture, names["standard"])}
        if "topk_threshold" in dict(sae.named_buffers()):
            tensors["topk_threshold"] = torch.tensor(THRESHOLD, dtype=torch.float64)
        plant(sae, **tensors)
        return sae

    def compute(sae: Any, x: torch.Tensor) -> Outputs:
        with torch.no_grad():
            codes = sae.encode(x)
            return Outputs(x, codes, sae.decode(codes), sae(x))

    def inference(case: Case, sae: Any, x: torch.Tensor) -> None:
        home = folder(case)
        sae.save_inference_model(home) if isinstance(sae, TrainingSAE) else sae.save_model(home)
        record(case, compute(SAE.load_from_disk(home), x))

    def checkpoint(case: Case, sae: Any, x: torch.Tensor) -> None:
        """What a checkpoint computes at inference is what its own export computes."""
        home = folder(case)
        sae.save_model(home)
        with tempfile.TemporaryDirectory() as exported:
            TrainingSAE.load_from_disk(home).save_inference_model(exported)
            record(case, compute(SAE.load_from_disk(exported), x))

    def scaled(case: Case, sae: Any, scaler: Any) -> Any:
        """Save a checkpoint with its scaler, as SAELens' trainer does; the scaler as read back."""
        home = folder(case)
        sae.save_model(home)
        scaler.save(str(home / "activation_scaler.json"))
        found = ActivationScaler()
        found.load(home / "activation_scaler.json")
        return found

    w, square = weights(), weights(D, D, seed=3)
    x = inputs(w)
    few((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    case = lambda name, architecture, kind, group="": Case("saelens", name, architecture, "sae", kind, group)  # noqa: E731

    inference(case("standard", "standard", "relu", "relu"), build("StandardSAE", w), x)
    inference(case("standard_square", "standard", "relu"), build("StandardSAE", square), inputs(square))
    no_b_dec = build("StandardSAE", w, apply_b_dec_to_input=False)
    inference(case("standard_b_dec_not_subtracted", "standard", "relu", "relu_new"), no_b_dec, x)
    for norm in ("layer_norm", "constant_norm_rescale"):
        inference(case(f"standard_{norm}", "standard", "relu"), build("StandardSAE", w, normalize_activations=norm), x)
    inference(case("topk", "topk", "topk", "topk"), build("TopKSAE", w, k=K), x)
    rescaled = build("TopKSAE", w, k=K, rescale_acts_by_decoder_norm=True)
    inference(case("topk_decoder_norm", "topk", "topk"), rescaled, x)
    inference(case("topk_layer_norm", "topk", "topk"), build("TopKSAE", w, k=K, normalize_activations="layer_norm"), x)
    inference(case("jumprelu", "jumprelu", "jumprelu"), build("JumpReLUSAE", w), x)
    not_subtracted = build("JumpReLUSAE", w, apply_b_dec_to_input=False)
    inference(case("jumprelu_b_dec_not_subtracted", "jumprelu", "jumprelu", "jumprelu"), not_subtracted, x)
    inference(case("gated", "gated", "gated", "gated"), build("GatedSAE", w), x)

    plain = {"k": K, "rescale_acts_by_decoder_norm": False}
    inference(case("batchtopk", "batchtopk", "batchtopk", "threshold"), build("BatchTopKTrainingSAE", w, **plain), x)
    inference(case("batchtopk_decoder_norm", "batchtopk", "batchtopk"), build("BatchTopKTrainingSAE", w, k=K), x)
    widths = [sum(GROUPS[: i + 1]) for i in range(len(GROUPS))]
    nested = build("MatryoshkaBatchTopKTrainingSAE", w, matryoshka_widths=list(widths), **plain)
    inference(case("matryoshka", "matryoshka_batchtopk", "matryoshka", "threshold"), nested, x)

    checkpoint(case("standard_checkpoint", "standard", "relu", "relu"), build("StandardTrainingSAE", w), x)
    checkpoint(case("topk_checkpoint", "topk", "topk"), build("TopKTrainingSAE", w, k=K), x)
    checkpoint(case("jumprelu_checkpoint", "jumprelu", "jumprelu"), build("JumpReLUTrainingSAE", w), x)
    checkpoint(case("gated_checkpoint", "gated", "gated", "gated"), build("GatedTrainingSAE", w), x)
    checkpoint(case("batchtopk_checkpoint", "batchtopk", "batchtopk"), build("BatchTopKTrainingSAE", w, k=K), x)
    nested = build("MatryoshkaBatchTopKTrainingSAE", w, matryoshka_widths=list(widths), k=K)
    checkpoint(case("matryoshka_checkpoint", "matryoshka_batchtopk", "matryoshka"), nested, x)

    one = case("expected_average_checkpoint", "standard", "relu")
    sae = build("StandardTrainingSAE", w, normalize_activations="expected_average_only_in")
    scaler = scaled(one, sae, ActivationScaler(scaling_factor=D**0.5 / 7.5))
    sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    record(one, compute(sae, x))
    inference(case("expected_average_folded", "standard", "relu"), sae, x)
    one = case("whitening_checkpoint", "standard", "relu")
    sae = build("StandardTrainingSAE", w, normalize_activations="covariance_whitening")
    scaler = ActivationScaler()
    mixing = torch.randn(D, D, generator=torch.Generator().manual_seed(6))
    scaler.estimate_whitening(D, iter([torch.randn(500, D, generator=torch.Generator().manual_seed(7)) @ mixing + w["b_dec"]]), 1)
    white = scaled(one, sae, scaler).whitening
    sae.fold_activation_whitening(white.mean, white.matrix, white.inverse_matrix)
    record(one, compute(sae, x))
    lost = Case("saelens", "expected_average_without_factor", "standard", "sae", refused="activation_scaler.json")
    build("StandardTrainingSAE", w, normalize_activations="expected_average_only_in").save_model(folder(lost))
    record(lost)

    def old(case: Case, x: torch.Tensor, shape: tuple[int, ...] = (), extra: tuple[str, ...] = (), **config: Any) -> None:
        """A config from before version 6, over the same weights; the library's own loader says what it means."""
        home = folder(case)
        tensors = {name: w[name] for name in names["standard"]} | {name: torch.ones(F) for name in extra}
        save_file(tensors, home / "sae_weights.safetensors")
        common = {"model_name": "gpt2-small", "d_in": D, "d_sae": F, "dtype": "torch.float32", "device": "cpu"}
        (home / "cfg.json").write_text(json.dumps({**common, **config}, indent=1))
        found = compute(SAE.load_from_disk(home), x.reshape(shape) if shape else x)
        record(case, Outputs(x, found.codes, *(part.reshape(len(x), D) for part in (found.decoded, found.x_hat))))

    first = {"hook_point": "blocks.8.hook_resid_pre", "hook_point_layer": 8}
    old(case("before_6_standard", "standard", "relu", "relu"), x, activation_fn_str="relu", normalize_activations=False, **first)
    one = case("before_6_scaling_factor", "standard", "relu", "relu")
    old(one, x, extra=("scaling_factor",), finetuning_scaling_factor=False, **first)
    third = {"hook_name": "blocks.8.hook_resid_pre", "sae_lens_version": "3.20.0", "apply_b_dec_to_input": True}
    kwargs = {"architecture": "standard", "activation_fn": "topk", "activation_fn_kwargs": {"k": K}}
    old(case("before_6_topk", "standard", "topk", "topk"), x, **kwargs, **third)
    old(case("before_6_hook_z", "standard", "relu", "relu"), x, (len(x), 3, 4), hook_name="blocks.8.attn.hook_z")

    for name, cls, settings, words in (
        ("transcoder", "Transcoder", {"d_out": D, "apply_b_dec_to_input": False}, "transcoder"),
        ("abstopk", "AbsTopKSAE", {"k": K}, "abs"),
    ):
        other = Case("saelens", name, name, "sae", refused=words)
        build(cls, w, **settings).save_model(folder(other))
        record(other)


# dictionary_learning


def dictionary_learning() -> None:
    """Fixtures of dictionary_learning's seven classes."""
    for name in ("nnsight", "zstandard"):
        stub = ModuleType(name)
        stub.LanguageModel = object  # type: ignore[attr-defined]
        sys.modules.setdefault(name, stub)
    from dictionary_learning import dictionary as d
    from dictionary_learning.trainers import batch_top_k, gdm, jumprelu, standard, top_k
    from dictionary_learning.trainers import matryoshka_batch_top_k as matryoshka

    def linear(w: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T}

    def write(case: Case, trainer: Any, tensors: dict[str, torch.Tensor], x: torch.Tensor, load: Callable[[str], Any]) -> None:
        home = folder(case)
        plant(trainer.ae, **tensors)
        buffer = {"d_submodule": x.shape[1], "io": "out", "n_ctxs": 10, "ctx_len": 128, "device": "cpu"}
        config = {**trainer.config, "dict_class": type(trainer.ae).__name__}
        (home / "config.json").write_text(json.dumps({"trainer": config, "buffer": buffer}, indent=4))
        torch.save({k: v.cpu() for k, v in trainer.ae.state_dict().items()}, home / "ae.pt")
        if case.refused:
            return record(case)
        ae = load(str(home / "ae.pt"))
        with torch.no_grad():
            codes = ae.encode(x)
            record(case, Outputs(x, codes, ae.decode(codes), ae(x)))

    w, square = weights(), weights(D, D, seed=3)
    x = inputs(w)
    place = {"layer": 8, "lm_name": "EleutherAI/pythia-70m-deduped", "submodule_name": "resid_post_layer_8", "device": "cpu"}
    make = lambda cls, f=F, **more: cls(steps=30000, activation_dim=D, dict_size=f, **place, **more)  # noqa: E731
    case = lambda name, architecture, kind, group="", refused="": Case(  # noqa: E731
        "dictionary_learning", name, architecture, "trainer_0", kind, group, refused
    )
    no_fold = lambda path: d.AutoEncoder.from_pretrained(path, normalize_decoder=False)  # noqa: E731

    plain = {**linear(w), "bias": w["b_dec"]}
    write(case("autoencoder", "AutoEncoder", "relu", "relu"), make(standard.StandardTrainer), plain, x, no_fold)
    tensors = {**linear(square), "bias": square["b_dec"]}
    trainer = make(standard.StandardTrainer, D)
    write(case("autoencoder_square", "AutoEncoder", "relu"), trainer, tensors, inputs(square), no_fold)
    trainer = make(standard.StandardTrainerAprilUpdate, dict_class=d.AutoEncoderNew)
    tensors = {**linear(w), "decoder.bias": w["b_dec"]}
    new = case("autoencoder_new", "AutoEncoderNew", "relu", "relu_new")
    write(new, trainer, tensors, x, d.AutoEncoderNew.from_pretrained)
    tensors = {n: t for n, t in linear(w).items() if n != "encoder.bias"}
    tensors.update(decoder_bias=w["b_dec"], gate_bias=w["b_gate"], mag_bias=w["b_mag"], r_mag=w["r_mag"])
    gated = case("gated", "GatedAutoEncoder", "gated", "gated")
    write(gated, make(gdm.GatedSAETrainer), tensors, x, d.GatedAutoEncoder.from_pretrained)
    tensors = {name: w[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    jump = case("jumprelu", "JumpReluAutoEncoder", "jumprelu", "jumprelu")
    write(jump, make(jumprelu.JumpReluTrainer), tensors, x, d.JumpReluAutoEncoder.from_pretrained)

    tensors = {**linear(w), "b_dec": w["b_dec"]}
    one = case("topk", "AutoEncoderTopK", "topk", "topk")
    write(one, make(top_k.TopKTrainer, k=K), tensors, x, top_k.AutoEncoderTopK.from_pretrained)
    tracked = {**tensors, "threshold": torch.tensor(THRESHOLD)}
    one = case("topk_with_threshold", "AutoEncoderTopK", "topk", "topk")
    write(one, make(top_k.TopKTrainer, k=K), tracked, x, top_k.AutoEncoderTopK.from_pretrained)
    one = case("batchtopk", "BatchTopKSAE", "batchtopk", "threshold")
    write(one, make(batch_top_k.BatchTopKTrainer, k=K), tracked, x, batch_top_k.BatchTopKSAE.from_pretrained)
    untracked = case("batchtopk_untracked", "BatchTopKSAE", "", refused="never tracked")
    write(untracked, make(batch_top_k.BatchTopKTrainer, k=K), tensors, x, batch_top_k.BatchTopKSAE.from_pretrained)
    tensors = {name: w[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    trainer = make(matryoshka.MatryoshkaBatchTopKTrainer, k=K, group_fractions=[size / F for size in GROUPS])
    one = case("matryoshka", "MatryoshkaBatchTopKSAE", "matryoshka", "threshold")
    tensors["threshold"] = torch.tensor(THRESHOLD)
    write(one, trainer, tensors, x, matryoshka.MatryoshkaBatchTopKSAE.from_pretrained)


# sparsify


def sparsify() -> None:
    """Fixtures of sparsify: topk in several placements, and what evalkit has to refuse."""
    from sparsify import SparseCoder, SparseCoderConfig

    def write(case: Case, w: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32, **settings: Any) -> None:
        home = folder(case)
        d, f = w["W_enc"].shape
        coder = SparseCoder(d, SparseCoderConfig(k=K, **{"num_latents": f, **settings}), dtype=dtype)
        plant(coder, **{"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]})
        if settings.get("normalize_decoder"):
            coder.set_decoder_norm_to_unit_norm()
        coder.save_to_disk(home)
        if case.refused:
            return record(case)
        coder = SparseCoder.load_from_disk(home).float()
        x = inputs(w)
        with torch.no_grad():
            top = coder.encode(x)
            if f > d:
                few(top.pre_acts)
            codes = torch.zeros(len(x), f).scatter(-1, top.top_indices, top.top_acts)
            record(case, Outputs(x, codes, coder.decode(top.top_acts, top.top_indices), coder(x).sae_out))

    w, square = weights(), weights(D, D, seed=3)
    case = lambda name, path, group="": Case("sparsify", name, "topk", path, "topk", group)  # noqa: E731
    write(case("topk", "layers.8", "topk"), w, normalize_decoder=False)
    write(case("topk_unit_decoder", "layers.8.mlp"), w, normalize_decoder=True)
    write(case("topk_square", "h.8"), square, normalize_decoder=False)
    write(case("topk_seeds", "layers.8.attention/seed1", "topk"), w, normalize_decoder=False)
    write(case("topk_half_precision", "layers.8"), w, torch.bfloat16, normalize_decoder=False)
    expansion = weights(D, 3 * D, seed=4)
    write(case("topk_expansion", "layers.8"), expansion, num_latents=0, expansion_factor=3, normalize_decoder=False)
    refuse = lambda name, words: Case("sparsify", name, name, "layers.8", refused=words)  # noqa: E731
    write(refuse("groupmax", "groupmax"), weights(D, 30, seed=5), activation="groupmax")
    write(refuse("transcoder", "transcoder"), w, transcode=True)
    write(refuse("skip_connection", "skip connection"), w, skip_connection=True)


def main() -> None:
    """Write every fixture anew."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    shutil.rmtree(HOME, ignore_errors=True)
    for write in (saelens, dictionary_learning, sparsify):
        write()
    found = {name: version(name) for name in ("torch", "sae-lens", "dictionary-learning", "eai-sparsify")}
    cases = [dataclasses.asdict(case) for case in CASES]
    (HOME / "cases.json").write_text(json.dumps({"versions": found, "cases": cases}, indent=1) + "\n")
    total = sum(file.stat().st_size for file in HOME.rglob("*") if file.is_file())
    assert total < 1_500_000, total
    assert all(load_file(file) for file in HOME.rglob("expected.safetensors"))
    print(f"{len(CASES)} cases, {total / 1000:.0f} kB in {HOME}")


if __name__ == "__main__":
    main()
