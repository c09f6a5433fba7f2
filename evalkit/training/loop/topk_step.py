"""A whole TopK training step without autograd, without waiting for the device, and with the optimiser in one kernel.

1. Encode by one dense product in the compute type, select, decode against the input, all as in ``topk`` with the loss's gradient
   written out: with r = x - x_hat, c the scale of the error and v the codes, d v = -2 c r . W_dec and d W_dec = -2 c v r.
2. The auxiliary loss reads the same scores, masked to dead features, with a fixed number of places; its pairs join the main ones,
   so that weight gradients are summed once.
3. Clipping by the exact global norm, the decoder's constraint and Adam follow in ``ops.adam_features``; rates come from a table
   on the device.
4. Whether features are dead is asked of the device only when one can be: what has been silent for q activations cannot die within
   the next (dead_after - q) / B steps, and until then the step without the auxiliary part is the same step.
5. With several processes the step is two graphs, before and after gradients are averaged, as ``Trainer.step`` averages them. The
   collective itself is not captured. Averaged gradients are dense: rows that this process did not use are 0 in its share.

State stays in the ``Trainer``'s own module, optimiser and counters, so that checkpoints, evaluation and the plain step go on from
it. Equal to ``Trainer.step`` to rounding in float32; with bfloat16 factors masters, moments and sums stay float32.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from jaxtyping import Float

from evalkit.training.architectures.topk import TrainableTopK
from evalkit.training.kernels import dense, ops
from evalkit.training.kernels.dispatch import sparse_pays
from evalkit.training.kernels.graph import Replay
from evalkit.training.kernels.oracles import Adam, Moments, Sums
from evalkit.training.loop.trainer import Step, Trainer, schedule

TABLE = 4096
"""Steps whose rates are on the device at a time."""

SETTINGS = {"auxk", "auxk_weight", "auxk_form", "auxk_relu", "auxk_silent", "k", "decoder", "variance"}
"""Settings of TopK that this step follows; one that it does not know leaves the step to ``Trainer``."""

WATCH = 32
"""Least steps between two looks at which features are dead."""


class _Part(NamedTuple):
    """What the main or the auxiliary loss says of its codes."""

    loss: torch.Tensor
    indices: torch.Tensor
    values: torch.Tensor
    """Codes times what the residual is multiplied by in the decoder's gradient."""
    back: torch.Tensor
    """Gradient of the codes before the ReLU."""
    live: torch.Tensor
    residual: torch.Tensor


class _Gradients(NamedTuple):
    """What a step's first half gives the second."""

    decoder: torch.Tensor
    encoder: torch.Tensor
    bias: torch.Tensor
    b_dec: torch.Tensor
    counts: torch.Tensor
    """(F,) int32; where it is 0, the rows of the matrices are undefined and count as 0."""


class FusedStep:
    """Takes the steps of one ``Trainer``.

    Args:
        trainer: of an architecture that ``fits``.
        compute: type of the factors of products; the config's when left out.
    """

    def __init__(self, trainer: Trainer, compute: torch.dtype | None = None) -> None:
        device = trainer.device
        self.trainer, self.device = trainer, device
        self.compute = compute or {"float32": torch.float32, "bfloat16": torch.bfloat16}[trainer.config.compute]
        module = trainer.module
        assert isinstance(module, TrainableTopK)
        self.module, self.own = module, module.own
        width = module.W_dec.shape[1]
        self.auxk = min(width // 2 if self.own.auxk is None else self.own.auxk, trainer.start.features)
        if not self.own.auxk_weight:
            self.auxk = 0
        self.free = self.own.decoder == "free"
        settings = trainer.optimiser.param_groups[0]
        self.rates = torch.ones(3, device=device)
        self.adam = Adam(self.rates, float(settings["betas"][0]), float(settings["betas"][1]), float(settings["eps"]))
        self.table = torch.zeros(TABLE, 2, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.report = torch.zeros(3, device=device)
        self.ones = torch.ones(trainer.start.features, dtype=torch.int32, device=device)
        self.no_bias = torch.zeros(width, device=device)
        self.inputs: dict[int, torch.Tensor] = {}
        self.tokens: dict[int, torch.Tensor] = {}
        self.fired = torch.zeros(trainer.start.features, dtype=torch.bool, device=device)
        self.shared: list[torch.Tensor] = []
        if trainer.group.size > 1:
            self.shared = [torch.empty_like(p, dtype=torch.float32) for p in self._parameters()]
        self.zero = torch.zeros((), device=device)
        self.whole = Replay(self._whole, device)
        self.before, self.after = Replay(self._before, device), Replay(self._after, device)
        self._marks: tuple[tuple[int, int], ...] = ()
        self._table_end = -1
        self._watch_until, self._with_aux = 0, False

    @classmethod
    def give(cls, trainer: Trainer) -> None:
        """Let this step take the trainer's steps, on a GPU and where it fits."""
        if trainer.device.type == "cuda" and cls.fits(trainer):
            trainer.stepper = cls(trainer)

    @staticmethod
    def fits(trainer: Trainer) -> bool:
        """Whether this step does what the trainer's own does: that of TopK."""
        known = {field.name for field in dataclasses.fields(TrainableTopK.settings)} <= SETTINGS
        return known and type(trainer.module) is TrainableTopK

    def step(self, x: Float[torch.Tensor, "B D"]) -> Step:
        """``Trainer.step``: one step on a batch, or this process's share of it, in the units of the data."""
        trainer, B = self.trainer, len(x)
        if self._now() != self._marks:
            self._adopt()
        if trainer.steps_done >= self._table_end:
            self._fill_table()
        if B not in self.inputs:
            self.inputs[B] = torch.empty(x.shape, device=self.device)
            tokens = torch.arange(B, dtype=torch.int32, device=self.device)
            main, extra = tokens.repeat_interleave(self.own.k), tokens.repeat_interleave(self.auxk)
            self.tokens[B] = torch.stack([torch.cat([main, extra]), torch.cat([main, extra + B])])
        self.inputs[B].copy_(x)
        self._take((B, self._aux(self._presented(B))))
        trainer.steps_done += 1
        trainer.module.step_number += 1
        self._marks = self._now()
        loss, fvu, l0 = self.report.clone().unbind()
        return Step(loss, fvu, l0)

    def _take(self, key: tuple[int, bool]) -> None:
        group = self.trainer.group
        if group.size == 1:
            self.whole(key)
            return
        self.before(key)
        group.average([*self.shared, self.report])
        self.fired.copy_(group.any(self.fired))
        self.after(key)

    def _presented(self, B: int) -> int:
        """Activations of a step, over all processes."""
        return B * self.trainer.group.size

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [self.module.W_dec, self.module.W_enc, self.module.b_enc, self.module.b_dec]

    def _now(self) -> tuple[tuple[int, int], ...]:
        """Where the state lies and how often others wrote to it: differs after a checkpoint was loaded."""
        states = [self.trainer.optimiser.state[p] for p in self._parameters()]
        moments = [s[name] for s in states for name in ("exp_avg", "exp_avg_sq") if name in s]
        return tuple((t.data_ptr(), t._version) for t in [*self._parameters(), *moments])

    def _adopt(self) -> None:
        """Work on the trainer's state as it is now."""
        for p in self._parameters():
            state: dict[str, Any] = self.trainer.optimiser.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=self.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        W_dec, W_enc = self.module.W_dec.detach(), self.module.W_enc.detach()
        same = self.compute == torch.float32
        self.dec_shadow = None if same else W_dec.to(self.compute)
        self.enc_shadow = None if same else W_enc.to(self.compute)
        self.norms = W_dec.norm(dim=1) if self.free else None
        self.counters = [self.trainer.optimiser.state[p]["step"] for p in self._parameters()]
        for replay in (self.whole, self.before, self.after):
            replay.reset()
        self._table_end, self._watch_until = -1, 0

    def _fill_table(self) -> None:
        """Rates of the next ``TABLE`` steps."""
        trainer = self.trainer
        done, taken = trainer.steps_done, int(self.counters[0])
        rows = []
        for i in range(TABLE):
            lr = trainer.config.peak_lr * schedule(trainer.config, done + i, trainer.start.steps)
            t = taken + i + 1
            rows.append((lr / (1 - self.adam.beta1**t), (1 - self.adam.beta2**t) ** -0.5))
        self.table.copy_(torch.tensor(rows))
        self.position.zero_()
        self._table_end = done + TABLE

    def _aux(self, B: int) -> bool:
        """Whether the auxiliary part is needed; with it and nothing dead the step is the same, only slower."""
        done = self.trainer.steps_done
        if self.auxk and done >= self._watch_until:
            left = self.trainer.config.dead_after - int(self.trainer.quiet_for.max())
            safe = max(0, -(-left // B))
            self._with_aux = safe < WATCH
            self._watch_until = done + max(safe, WATCH)
        return self._with_aux

    @torch.no_grad()
    def _whole(self, key: tuple[int, bool]) -> None:
        """The step on ``inputs``, in place; never waits for the device."""
        self._update(self._backward(key), key[0])

    @torch.no_grad()
    def _before(self, key: tuple[int, bool]) -> None:
        """This process's gradients into ``shared``."""
        made = self._backward(key)
        unused = made.counts == 0
        for mine, matrix in zip(self.shared, (made.decoder, made.encoder), strict=False):
            torch.where(unused[:, None], self.zero, matrix, out=mine)
        self.shared[2].copy_(made.bias)
        self.shared[3].copy_(made.b_dec)

    @torch.no_grad()
    def _after(self, key: tuple[int, bool]) -> None:
        """The step, with the averaged gradients."""
        decoder, encoder, bias, b_dec = self.shared
        self._update(_Gradients(decoder, encoder, bias, b_dec, self.ones), key[0])

    def _backward(self, key: tuple[int, bool]) -> _Gradients:
        """Gradients of ``inputs``; what is reported, and which features fired, are noted."""
        B, with_aux = key
        trainer = self.trainer
        W_dec, W_enc, b_enc, b_dec = (p.detach() for p in self._parameters())
        enc = W_enc if self.enc_shadow is None else self.enc_shadow
        dec = W_dec if self.dec_shadow is None else self.dec_shadow
        x = self.inputs[B] * trainer.scale
        features = len(W_dec)
        scale = self._scale(x)
        centred = (x - b_dec).to(self.compute)
        scores = centred @ enc.T
        values, indices = ops.select(scores, b_enc, self.own.k, self.norms)

        sparse = sparse_pays(self.own.k, features, self.device)
        decode_error = ops.decode_error if sparse else dense.decode_error
        decoded = decode_error(values, indices, dec, x, b_dec, self.compute)
        squares, live, pull = decoded.squares.sum(), values > 0, -2 * scale
        back = torch.where(live, decoded.dots * pull, 0.0)
        main = _Part(squares * scale, indices, values * pull, back, live, decoded.residual)
        fired = ops.counts(torch.where(live, indices, features).flatten(), features)
        loss, parts = main.loss, [main]
        if with_aux:
            candidates = trainer.dead & (fired == 0) if self.own.auxk_silent else trainer.dead
            parts.append(self._auxiliary(candidates, scores, b_enc, dec, main.residual, squares, scale))
            loss = loss + parts[1].loss

        sums, counts = self._gradients(parts, centred, B, features) if sparse else self._dense(parts, centred, features)
        assert sums.encoder is not None and sums.bias is not None
        b_dec_gradient = main.residual.sum(0, dtype=torch.float32) * pull - sums.bias @ W_enc
        fvu = squares / (B * trainer.start.variance)
        self.report.copy_(torch.stack([loss, fvu, fired.sum() / B]))
        torch.gt(fired, 0, out=self.fired)
        return _Gradients(sums.decoder, sums.encoder, sums.bias, b_dec_gradient, counts)

    def _update(self, gradients: _Gradients, B: int) -> None:
        """Clipping, constraint, Adam and counters, in place."""
        trainer, module, counts = self.trainer, self.module, gradients.counts
        if trainer.config.clip is not None:
            unit = None if self.free else module.W_dec.detach()
            total = ops.row_squares(gradients.decoder, gradients.encoder, counts, unit).sum()
            total = total + gradients.bias.square().sum() + gradients.b_dec.square().sum()
            self.rates[2:].copy_((trainer.config.clip / (total.sqrt() + 1e-6)).clamp(max=1.0))
        self.rates[:2].copy_(self.table.index_select(0, self.position)[0])
        self.position += 1
        four = [
            Moments(p.detach(), g, trainer.optimiser.state[p]["exp_avg"], trainer.optimiser.state[p]["exp_avg_sq"])
            for p, g in zip(self._parameters(), gradients[:4], strict=True)
        ]
        shadows = (self.dec_shadow, self.enc_shadow, self.norms)
        ops.adam_features(four[0], four[1], four[2], counts, self.adam, not self.free, *shadows)
        ops.adam_vector(four[3], self.adam)

        torch._foreach_add_(self.counters, 1)
        trainer.quiet_for.add_(self._presented(B)).masked_fill_(self.fired, 0)

    def _scale(self, x: torch.Tensor) -> torch.Tensor | float:
        """What ``losses.reconstruction`` multiplies a batch's summed squares by."""
        if self.module.error == "fvu" and self.own.variance == "batch":
            return 1 / (len(x) * x.var(0, correction=0).sum())
        size = {"sum": 1.0, "mean": x.shape[1], "fvu": self.trainer.start.variance}[self.module.error]
        return 1 / (len(x) * size)

    def _auxiliary(
        self,
        dead: torch.Tensor,
        scores: torch.Tensor,
        b_enc: torch.Tensor,
        dec: torch.Tensor,
        residual: torch.Tensor,
        squares: torch.Tensor,
        scale: torch.Tensor | float,
    ) -> _Part:
        """``auxk.auxiliary_loss`` with a place for each of ``auxk`` features, filled or not."""
        number, weight = dead.sum(), self.own.auxk_weight
        values, indices = ops.select(scores, b_enc, self.auxk, self.norms, dead, self.own.auxk_relu)
        left = ops.decode_error(values, indices, dec, residual, self.no_bias, self.compute)
        if self.own.auxk_form == "normalised":
            price = weight / squares.clamp(min=1e-12)
        elif self.own.auxk_form == "variance":
            scatter = residual.float().var(0, correction=0).sum()
            price = weight / (len(residual) * scatter.clamp(min=1e-12))
        else:
            most = dec.shape[1] // 2 if self.own.auxk is None else self.own.auxk
            price = weight * scale * (number / most).clamp(max=1.0)
        price = torch.where(number > 0, price, 0.0)
        live = values > 0 if self.own.auxk_relu else values != 0
        back = torch.where(live, left.dots * (-2 * price), 0.0)
        return _Part(price * left.squares.sum(), indices, values * (-2 * price), back, live, left.residual)

    def _gradients(self, parts: list[_Part], centred: torch.Tensor, B: int, features: int) -> tuple[Sums, torch.Tensor]:
        """Sums over the pairs of all parts, and how many each feature has."""

        def flat(name: str) -> torch.Tensor:
            return torch.cat([getattr(part, name).flatten() for part in parts])

        indices = flat("indices")
        pairs = ops.by_feature(indices, flat("live"), features)
        enc_rows, dec_rows = self.tokens[B][:, : len(indices)].unbind()
        residuals = torch.cat([part.residual for part in parts])
        return ops.segment_sums(pairs, flat("values"), dec_rows, residuals, flat("back"), enc_rows, centred), pairs.counts

    def _dense(self, parts: list[_Part], centred: torch.Tensor, features: int) -> tuple[Sums, torch.Tensor]:
        """The same by dense products, which define every row."""
        made = [dense.sums(p.values, p.back, p.indices, features, p.residual, centred) for p in parts]
        first = made[0]
        for more in made[1:]:
            assert first.encoder is not None and more.encoder is not None and first.bias is not None and more.bias is not None
            first = Sums(first.decoder + more.decoder, first.encoder + more.encoder, first.bias + more.bias)
        return first, self.ones
