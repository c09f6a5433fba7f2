"""What a baseline makes of its components' scores: signed, rectified or split codes, all of them or the k largest.

The baselines of Cunningham et al. 2023 (arXiv 2309.08600, sections 3 and 4, appendices F and G) differ in this and in their
directions only:

1. A baseline reads scores s (..., C), one a component.
2. Signed: codes = s. Rectified: codes = ReLU(s), which looks at the positive tail only.
3. Split (the paper's "non-negative" PCA): component c becomes two features, ReLU(s_c) and ReLU(-s_c), that write w_c and
   -w_c. Features 0 .. C-1 are the positive sides and C .. 2C-1 the negative ones. No code is negative and nothing is lost:
   the reconstruction is the signed one's to the last bit.
4. Top k: of a token's codes the k largest by magnitude are kept, so that a baseline can be given the L0 of an autoencoder.
   For split codes this is the published top-K form (the K largest of +s and -s, then a ReLU). In a suite ``top_k`` may name
   another dictionary: k is then its mean number of active features on the fitting text, rounded.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float

from evalkit.dictionaries.base import Dictionary, SparseCodes
from evalkit.errors import DictionaryError, UsageError
from evalkit.util.settings import Settings


@dataclass(frozen=True)
class Form:
    """How scores become codes.

    Raises:
        DictionaryError: a top_k that is no number of features, or halves of a split that are not rectified.
    """

    rectified: bool
    """Codes pass a ReLU; always so where they are split."""
    split: bool = False
    """Two features a component, one for each sign."""
    top_k: int | None = None
    """Codes kept a token, largest magnitude first; all of them for None."""

    def __post_init__(self) -> None:
        if self.split and not self.rectified:
            raise DictionaryError(
                "split codes are rectified: each sign has a feature of its own",
                where="split",
                fix="set rectified, or leave out split",
            )
        if self.top_k is not None and (not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < 1):
            raise DictionaryError(
                f"top_k = {self.top_k!r} is not a number of active features",
                where="top_k",
                fix="choose 1 or more, or leave it out",
            )

    @property
    def signed(self) -> bool:
        """Whether codes can be negative."""
        return not self.rectified

    def extras(self) -> dict[str, Any]:
        """split and top_k where they are used; what is unused is left out, so that it changes no identity."""
        return {**({"split": True} if self.split else {}), **({} if self.top_k is None else {"top_k": self.top_k})}

    def features(self, components: int) -> int:
        """Number of features that ``components`` make.

        Raises:
            DictionaryError: ``top_k`` exceeds it.
        """
        features = 2 * components if self.split else components
        if self.top_k is not None and self.top_k > features:
            raise DictionaryError(
                f"top_k = {self.top_k} exceeds the {features} features",
                where="top_k",
                fix=f"choose 1 to {features}, or leave it out",
            )
        return features

    def codes(self, scores: Float[torch.Tensor, "*batch C"]) -> Float[torch.Tensor, "*batch F"]:
        """Dense codes of ``scores``, whose memory may be used again."""
        if self.top_k is not None:
            kept = self.kept(scores)
            dense = scores.new_zeros(*scores.shape[:-1], self.features(scores.shape[-1]))
            # added, because padding entries share index 0 with a feature that may be active
            return dense.scatter_add_(-1, kept.indices, kept.values)
        if self.split:
            return torch.cat([scores.relu(), (-scores).relu()], dim=-1)
        return scores.relu_() if self.rectified else scores

    def kept(self, scores: Float[torch.Tensor, "*batch C"]) -> SparseCodes:
        """The ``top_k`` codes of ``scores``, largest magnitude first; zeros among them have index 0."""
        components = scores.shape[-1]
        k = min(self.top_k or components, components)  # at most one half of a split component is active
        sizes = scores.relu() if self.rectified and not self.split else scores.abs()
        values, indices = sizes.topk(k, dim=-1)
        if self.split:
            indices = indices + components * (scores.gather(-1, indices) < 0)
        elif self.signed:
            values = scores.gather(-1, indices)
        return SparseCodes(values, indices * (values != 0))

    def fold(self, codes: Float[torch.Tensor, "*batch F"]) -> Float[torch.Tensor, "*batch C"]:
        """One number a component: how much of its row ``codes`` write."""
        if not self.split:
            return codes
        half = codes.shape[-1] // 2
        return codes[..., :half] - codes[..., half:]

    def unfold(self, rows: Float[torch.Tensor, "C D"]) -> Float[torch.Tensor, "F D"]:
        """What each feature writes, where component c writes ``rows[c]``."""
        return torch.cat([rows, -rows]) if self.split else rows


def kept_count(top_k: int | str | None) -> int | None:
    """``top_k`` of a baseline's settings as a number; None where it names a dictionary whose L0 is not known yet."""
    return None if isinstance(top_k, str) else top_k


@dataclass(frozen=True)
class FormSettings(Settings):
    """Base of the settings of a baseline that is read in some ``Form``.

    Raises:
        DictionaryError: a value that its type does not allow, or settings that make no form.
    """

    refusal: ClassVar[type[UsageError]] = DictionaryError

    top_k: int | str | None = None
    """Keep a token's top_k largest codes by magnitude, to match an autoencoder's L0; all of them when left out. The
    name of another dictionary stands for its mean number of active features on the fitting text."""

    def check_together(self) -> None:
        self.form()

    def form(self) -> Form:
        """How codes are read."""
        raise NotImplementedError


class Formed(Dictionary):
    """Base of the dictionaries whose codes are scores in some ``Form``; a subclass gives ``scores``.

    Args:
        form: how scores become codes.
        where: ``hook_point``, ``model`` and ``details``.
    """

    def __init__(self, form: Form, **where: Any) -> None:
        super().__init__(**where)
        self.form = form

    @abstractmethod
    def scores(self, x: Float[torch.Tensor, "*batch D"]) -> Float[torch.Tensor, "*batch C"]:
        """What the components read in ``x``, in memory of its own.

        Raises:
            DictionaryError: ``x`` has another width.
        """

    @property
    def rectified(self) -> bool:
        """Whether codes pass a ReLU."""
        return self.form.rectified

    @property
    def signed(self) -> bool:  # type: ignore[override]  # the contract's class variable depends on a setting here
        """Whether codes can be negative: yes unless they are rectified."""
        return self.form.signed

    @property
    def sparse(self) -> bool:  # type: ignore[override]  # as above
        """Whether few features are active: where only the ``top_k`` are kept."""
        return self.form.top_k is not None

    def settings(self) -> dict[str, Any]:
        """rectified, and split and top_k where they are used."""
        return {"rectified": self.rectified, **self.form.extras()}

    def encode(self, x: Float[torch.Tensor, "*batch D"]) -> Float[torch.Tensor, "*batch F"]:
        """The scores of ``x`` in this dictionary's form."""
        return self.form.codes(self.scores(x))

    def _active(self, x: Float[torch.Tensor, "B D"]) -> SparseCodes:
        """The ``top_k`` alone, where there is one."""
        return self.form.kept(self.scores(x)) if self.sparse else super()._active(x)
