"""SAELens, dictionary_learning and sparsify, unmodified, each at several settings.

1. SAELens: ``SAETrainer.step`` on a training SAE of its own classes. Settings: as shipped; autocast to bfloat16; COO sparse
   codes; its compile option (``torch.compile`` of the forward pass, as its runner does).
2. dictionary_learning: ``update`` of its trainers, as ``trainSAE`` calls it. Settings: as shipped; autocast to bfloat16. Steps
   are numbered from 1, so that the trainer does not replace the common b_dec by the first batch's median.
3. sparsify: its ``SparseCoder`` in the order of operations of ``Trainer.fit``: decoder to unit length, forward with the batch's
   variance, backward, gradient projection, optimiser, schedule, dead counters. What ``fit`` does for language models (masks,
   copies of outputs) is left out, in its favour. Settings: its default optimiser; ``adam``; adam inside autocast to bfloat16 (on
   a GPU its forward pass has that built in).

nnsight and zstandard, which dictionary_learning imports to read language models and text, are replaced by empty modules where
they are not installed: they are not on the path of a step. Nothing else is replaced.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from collections.abc import Callable
from importlib.metadata import version
from types import ModuleType
from typing import Any

import torch
from contestants import FRACTIONS, Contestant, HeldOut, Job, Weights, sparsity_rise

STUBBED: list[str] = []
"""Modules that were replaced by empty ones."""


def prepare() -> dict[str, str]:
    """Import the peers; their versions.

    Raises:
        SystemExit: one of them is not installed.
    """
    try:
        import sae_lens  # noqa: F401

        with contextlib.redirect_stdout(io.StringIO()):
            import sparsify  # noqa: F401
        for name in ("nnsight", "zstandard"):
            if importlib.util.find_spec(name) is None:
                stub = ModuleType(name)
                stub.LanguageModel = object  # type: ignore[attr-defined]
                sys.modules[name] = stub
                STUBBED.append(name)
        import dictionary_learning  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"a peer is missing ({error}): benchmarks/README.md says how to make the environment") from error
    return {name: version(name) for name in ("sae-lens", "dictionary-learning", "eai-sparsify")}


def _outcome(residual: torch.Tensor, codes: torch.Tensor) -> HeldOut:
    active = codes != 0
    return HeldOut(float(residual.double().square().sum()), int(active.sum()), active.any(0))


class SAELens(Contestant):
    """SAELens in one of the settings 'shipped', 'autocast', 'sparse', 'compiled'."""

    recipe = "saelens"
    length = 0.1

    def __init__(self, job: Job, weights: Weights, setting: str) -> None:
        from sae_lens import config, saes
        from sae_lens.training.sae_trainer import SAETrainer

        self.name = f"SAELens {version('sae-lens')}, {_SAELENS_WORDS[setting]}"
        own: dict[str, Any] = {"k": job.k} if job.architecture in ("topk", "batchtopk", "matryoshka") else {}
        if setting == "sparse":
            own["use_sparse_activations"] = True
        if job.architecture == "matryoshka":
            own["matryoshka_widths"] = [round(job.features * sum(FRACTIONS[: n + 1])) for n in range(len(FRACTIONS))]
        stem = {
            "topk": "TopK", "batchtopk": "BatchTopK", "matryoshka": "MatryoshkaBatchTopK", "relu": "Standard",
            "jumprelu": "JumpReLU",
        }[job.architecture]  # fmt: skip
        settings = getattr(saes, f"{stem}TrainingSAEConfig")(d_in=job.width, d_sae=job.features, device=job.device, **own)
        self.sae = getattr(saes, f"{stem}TrainingSAE")(settings)
        with torch.no_grad():
            self.sae.W_enc.copy_(weights.W_enc.T)
            self.sae.W_dec.copy_(weights.W_dec)
            self.sae.b_enc.copy_(weights.b_enc)
            self.sae.b_dec.copy_(weights.b_dec)
        if setting == "compiled":
            self.sae.training_forward_pass = torch.compile(self.sae.training_forward_pass)
        run = config.SAETrainerConfig(
            total_training_samples=job.steps * job.batch,
            train_batch_size_samples=job.batch,
            device=job.device,
            lr_end=3e-5,  # as its runner fills it in; a constant rate does not use it
            autocast=setting == "autocast",
            **({"lr": job.lr} if job.lr else {}),
            **({"dead_feature_window": job.window} if job.window else {}),
        )
        self.trainer = SAETrainer(run, self.sae, iter(()))

    def step(self, x: torch.Tensor) -> torch.Tensor:
        loss = self.trainer.step(x).loss.detach()
        self.trainer.n_training_steps += 1
        return loss

    @torch.no_grad()
    def held_out(self, x: torch.Tensor) -> HeldOut:
        codes, _ = self.sae.encode_with_hidden_pre(x)
        written = self.sae.decode(codes)
        return _outcome(x - written, codes.to_dense() if codes.is_sparse else codes)


_SAELENS_WORDS = {
    "shipped": "as shipped",
    "autocast": "autocast to bfloat16",
    "sparse": "use_sparse_activations",
    "compiled": "compiled",
}


class DictionaryLearning(Contestant):
    """dictionary_learning in one of the settings 'shipped', 'autocast'."""

    recipe = "dictionary_learning"

    def __init__(self, job: Job, weights: Weights, setting: str) -> None:
        from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, standard, top_k

        words = {"shipped": "as shipped", "autocast": "autocast to bfloat16"}
        self.name = f"dictionary_learning {version('dictionary-learning')}, {words[setting]}"
        self.autocast, self.device, self.architecture = setting == "autocast", torch.device(job.device), job.architecture
        common: dict[str, Any] = {
            "steps": job.steps, "activation_dim": job.width, "dict_size": job.features, "layer": 0, "lm_name": "none",
            "warmup_steps": job.rise, "device": job.device, **({"lr": job.lr} if job.lr else {}),
        }  # fmt: skip
        match job.architecture:
            case "topk":
                self.trainer = top_k.TopKTrainer(k=job.k, **common)
            case "batchtopk":
                self.trainer = batch_top_k.BatchTopKTrainer(k=job.k, **common)
            case "matryoshka":
                self.trainer = matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer(
                    k=job.k, group_fractions=list(FRACTIONS), **common
                )
            case _:
                rise = {"sparsity_warmup_steps": sparsity_rise(job)}
                self.trainer = standard.StandardTrainer(**common, **rise)
        ae = self.trainer.ae
        with torch.no_grad():
            if job.architecture == "matryoshka":
                ae.W_enc.copy_(weights.W_enc.T)
                ae.W_dec.copy_(weights.W_dec)
                ae.b_enc.copy_(weights.b_enc)
            else:
                ae.encoder.weight.copy_(weights.W_enc)
                ae.encoder.bias.copy_(weights.b_enc)
                ae.decoder.weight.copy_(weights.W_dec.T)
            (ae.bias if job.architecture == "relu" else ae.b_dec).copy_(weights.b_dec)
        if job.window:
            self.trainer.dead_feature_threshold = job.window * job.batch
        self.number = 0 if job.architecture == "relu" else 1
        self.silent = job.architecture == "relu"
        """Whether ``update`` does not tell the loss."""

    def step(self, x: torch.Tensor) -> torch.Tensor | float:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.trainer.update(self.number, x)
        self.number += 1
        return float("nan") if loss is None else loss

    @torch.no_grad()
    def loss(self, x: torch.Tensor) -> float:
        """The loss before a step, where ``update`` does not tell it."""
        return float(self.trainer.loss(x, step=self.number))

    @torch.no_grad()
    def held_out(self, x: torch.Tensor) -> HeldOut:
        ae = self.trainer.ae
        codes = ae.encode(x) if self.architecture in ("relu", "topk") else ae.encode(x, use_threshold=False)
        return _outcome(x - ae.decode(codes), codes)


class Sparsify(Contestant):
    """sparsify in one of the settings 'shipped', 'adam', 'autocast'."""

    recipe = "sparsify"

    def __init__(self, job: Job, weights: Weights, setting: str) -> None:
        from schedulefree import ScheduleFreeWrapper
        from sparsify import SparseCoder, SparseCoderConfig, TrainConfig
        from sparsify.sign_sgd import SignSGD
        from transformers import get_linear_schedule_with_warmup

        words = {"shipped": "as shipped (signum)", "adam": "adam", "autocast": "adam, autocast to bfloat16"}
        self.name = f"sparsify {version('eai-sparsify')}, {words[setting]}"
        self.autocast, self.device = setting == "autocast", torch.device(job.device)
        coder = SparseCoderConfig(num_latents=job.features, k=job.k)
        self.config = TrainConfig(coder)
        self.sae = SparseCoder(job.width, coder, job.device, dtype=torch.float32)
        with torch.no_grad():
            self.sae.encoder.weight.copy_(weights.W_enc)
            self.sae.encoder.bias.copy_(weights.b_enc)
            self.sae.W_dec.copy_(weights.W_dec)
            self.sae.b_dec.copy_(weights.b_dec)
        size = (job.features / 2**14) ** 0.5
        self.schedule: Callable[[], None] = lambda: None
        if setting == "shipped":
            self.comparable = "sign descent, schedule-free averaging: another optimiser than the recipe's"
            self.optimiser: Any = ScheduleFreeWrapper(SignSGD(self.sae.parameters(), lr=job.lr or 5e-3 / size), momentum=0.95)
            self.optimiser.train()
        else:
            self.optimiser = torch.optim.Adam(self.sae.parameters(), lr=job.lr or 2e-4 / size)
            self.schedule = get_linear_schedule_with_warmup(self.optimiser, job.rise, job.steps).step
        self.silent = torch.zeros(job.features, dtype=torch.long, device=job.device)
        self.fired = torch.zeros(job.features, dtype=torch.bool, device=job.device)

    def step(self, x: torch.Tensor) -> torch.Tensor:
        self.sae.set_decoder_norm_to_unit_norm()
        alpha = self.config.auxk_alpha
        dead = self.silent > self.config.dead_feature_threshold if alpha > 0 else None
        variance = (x - x.mean(0)).pow(2).sum()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            out = self.sae(x=x, y=x, dead_mask=dead, total_variance=variance)
        self.fired[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        loss = out.fvu + alpha * out.auxk_loss + out.multi_topk_fvu / 8
        loss.backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.schedule()
        with torch.no_grad():
            self.silent += len(x)
            self.silent[self.fired] = 0
            self.fired.zero_()
        return loss.detach()

    @torch.no_grad()
    def held_out(self, x: torch.Tensor) -> HeldOut:
        out = self.sae(x)
        codes = x.new_zeros(len(x), self.sae.num_latents).scatter_(1, out.latent_indices, out.latent_acts.float())
        return _outcome(x - out.sae_out, codes)


class Entry:
    """One contestant to be made: library and setting."""

    def __init__(self, kind: type[Contestant], setting: str, *architectures: str) -> None:
        self.kind, self.setting, self.architectures = kind, setting, architectures

    def make(self, job: Job, weights: Weights) -> Contestant:
        """The contestant."""
        return self.kind(job, weights, self.setting)  # type: ignore[call-arg]


_CHOOSING = ("topk", "batchtopk", "matryoshka")

ENTRIES: dict[str, Entry] = {
    "saelens": Entry(SAELens, "shipped", *_CHOOSING, "relu", "jumprelu"),
    "saelens-autocast": Entry(SAELens, "autocast", *_CHOOSING, "relu", "jumprelu"),
    "saelens-sparse": Entry(SAELens, "sparse", "topk"),
    "saelens-compiled": Entry(SAELens, "compiled", *_CHOOSING, "relu", "jumprelu"),
    "dictionary_learning": Entry(DictionaryLearning, "shipped", *_CHOOSING, "relu"),
    "dictionary_learning-autocast": Entry(DictionaryLearning, "autocast", *_CHOOSING, "relu"),
    "sparsify": Entry(Sparsify, "shipped", "topk"),
    "sparsify-adam": Entry(Sparsify, "adam", "topk"),
    "sparsify-autocast": Entry(Sparsify, "autocast", "topk"),
}
"""All contestants by the name that ``--contestants`` takes."""

REFERENCE = {"saelens": "saelens", "dictionary_learning": "dictionary_learning", "sparsify": "sparsify-adam"}
"""For each recipe, the contestant in float32 whose losses evalkit's have to equal."""
