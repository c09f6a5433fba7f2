"""Captures: the BOS and first positions are never kept, and what is not finite is said and not left out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evalkit.activations.capture import ExclusionConfig, capture
from evalkit.activations.facts import capture_line, left_out, text_line
from evalkit.activations.fragments import fragment_lists
from evalkit.activations.massive import norm_limit
from evalkit.dictionaries.neurons import Neurons
from evalkit.errors import ModelError
from evalkit.models.language_model import LanguageModel
from evalkit.text.corpora import Document
from evalkit.text.windows import TokenWindows, cut_windows
from evalkit.util.progress import Progress

HOOK = "blocks.0.hook_resid_post"
QUIET = Progress(quiet=True)


class Model(LanguageModel):
    """Activations of width 4 that tell a token by its number; those of ``other`` have other values."""

    def __init__(self, other: dict[int, float], dtype: torch.dtype = torch.float32) -> None:
        self.other, self.dtype = other, dtype
        self.identity = f"{sorted(other.items())} {dtype}"

    def width(self, hook_point: str) -> int:
        return 4

    def activations(self, tokens: torch.Tensor, hook_point: str) -> torch.Tensor:
        x = (tokens % 5 + 1.0)[..., None].repeat(1, 1, 4)
        for token, value in self.other.items():
            x[tokens == token] = value
        return x


def windows(bos: int | None = None):
    documents = [Document(str(n), "abcdefghij" * 12) for n in range(4)] + [Document("short", "x")]
    return cut_windows(documents, lambda text: [ord(c) for c in text], 12, 240, 0, bos=bos)


@pytest.mark.parametrize("first", [0, 1, 3])
def test_the_bos_is_never_kept_and_is_one_of_the_first_positions(tmp_path, first):
    rule = ExclusionConfig(first_positions=first, norm_multiple=0.0)
    found = capture(Model({}), windows(bos=7), HOOK, rule, tmp_path, QUIET, name="text")
    assert found.opening == 1 and not found.keep[:, : max(1, first)].any() and found.keep[:, max(1, first) :].all()
    assert left_out(found) == (len(found.keep), len(found.keep) * (max(1, first) - 1), 0)
    again = capture(Model({}), windows(bos=7), HOOK, rule, tmp_path, QUIET, name="text")
    assert torch.equal(again.keep, found.keep) and again.opening == 1
    plain = capture(Model({}), windows(), HOOK, rule, tmp_path, QUIET, name="text")
    assert plain.opening == 0 and plain.keep[:, first:].all() and plain.identity != found.identity


def test_no_fragment_holds_the_bos(tmp_path):
    found = capture(Model({}), windows(bos=7), HOOK, ExclusionConfig(0, 0.0), tmp_path, QUIET, name="text")
    lists = fragment_lists(
        Neurons(torch.tensor(1.0), torch.zeros(4), True), found, length=4, top=3, random=3, seed=0, progress=QUIET
    )
    starts = torch.cat([lists.top_start[lists.top >= 0], lists.random_start[lists.random >= 0]])
    assert len(starts) and int(starts.min()) >= 1  # 12 tokens are three fragments of four, 11 behind a BOS are two


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("multiple", [0.0, 5.0])
def test_activations_that_are_not_finite_are_said_and_not_left_out_as_massive(tmp_path, value, multiple):
    text = windows()
    broken = int((text.tokens == ord("c")).sum())
    rule = ExclusionConfig(norm_multiple=multiple)
    with pytest.raises(
        ModelError, match=f"{broken} of 240 positions of the fitting text have activations that are not"
    ) as caught:
        capture(Model({ord("c"): value}, torch.float16), text, HOOK, rule, tmp_path, QUIET, name="fitting text")
    assert "float16 overflows" in caught.value.what and "bfloat16" in caught.value.fix and caught.value.where == HOOK
    assert not list(tmp_path.iterdir()), "nothing of it is kept"
    with pytest.raises(ModelError, match="in float32") as caught:
        capture(Model({ord("c"): value}), text, HOOK, rule, tmp_path, QUIET, name="fitting text")
    assert "weights" in caught.value.fix


def test_what_is_counted_is_said(tmp_path):
    text = windows(bos=7)
    assert text_line("fit", text) == (
        "fitting text: 240 tokens (240 asked for) in 20 windows of 12 from 4 documents; 1 documents are shorter than a window"
    )
    found = capture(Model({ord("c"): 1e3}), text, HOOK, ExclusionConfig(norm_multiple=5.0), tmp_path, QUIET, name="text")
    massive = int((text.tokens[:, 2:] == ord("c")).sum())
    assert massive and left_out(found) == (20, 20, massive)
    left = f"20 BOS, 20 first, {massive} massive (norm limit "
    assert capture_line("score", HOOK, found).startswith(
        f"scoring text at {HOOK}: {200 - massive} of 240 positions kept; left out: {left}"
    )


class Planted(LanguageModel):
    """Activations with the norms that are given, in turns along four dimensions, one way and the other."""

    dtype = torch.float32

    def __init__(self, norms: np.ndarray) -> None:
        self.norms, self.identity = torch.from_numpy(norms).float(), f"planted {norms.sum()}"
        self.read = 0

    def width(self, hook_point: str) -> int:
        return 4

    def activations(self, tokens: torch.Tensor, hook_point: str) -> torch.Tensor:
        place = torch.arange(self.read, self.read + tokens.numel())
        self.read += tokens.numel()
        sign = 1.0 - 2.0 * (place // 4 % 2)
        x = torch.nn.functional.one_hot(place % 4, 4) * (sign * self.norms[place])[:, None]
        return x.view(*tokens.shape, 4)


def captured(norms: np.ndarray, folder, rule=None, **more):
    tokens = torch.arange(len(norms)).view(-1, 100)
    text = TokenWindows(tokens, torch.arange(len(tokens)), [str(n) for n in range(len(tokens))], f"id {norms.sum()}", 0)
    return capture(Planted(norms), text, HOOK, rule or ExclusionConfig(first_positions=0), folder, QUIET, name="text", **more)


def test_the_gap_between_two_groups_of_norms_is_found_whatever_lies_on_either_side(tmp_path):
    draw = np.random.default_rng(0)
    ordinary, massive = np.exp(draw.normal(4.8, 0.2, 9_860)), 500 * np.exp(draw.normal(0, 0.15, 140))
    norms = draw.permutation(np.concatenate([ordinary, massive]))
    found = captured(norms, tmp_path)
    assert ordinary.max() < found.limit < massive.min() and int((~found.keep).sum()) == 140
    # the mean is next to nothing, so that the variance is the norm squared
    away = np.square(norms)
    assert found.norms.massive_variance == pytest.approx(away[norms > 300].sum() / away.sum(), rel=0.01)
    assert (
        found.norms.massive_variance > 0.15
        and found.norms.high_variance < 0.05
        and "warning" not in capture_line("fit", HOOK, found)
    )
    # five medians, the fixed multiple of before, lie inside the massive group and keep most of it
    fixed = captured(norms, tmp_path, ExclusionConfig(0, 5.0))
    assert int((~fixed.keep).sum()) < 30 and fixed.norms.high_variance > 0.15
    assert "warning: at blocks.0.hook_resid_post, kept positions above 2.5 times the median norm" in capture_line(
        "fit", HOOK, fixed
    )
    # the limit of the fitting text is that of the scoring text, whatever its own norms
    other = captured(draw.permutation(norms)[:5_000] * 1.5, tmp_path, limit=found.limit)
    assert other.limit == found.limit and not other.keep[torch.from_numpy(other.x.norm(dim=-1).numpy()) > found.limit].any()


def test_a_cluster_that_is_few_positions_and_a_quarter_of_the_variance_is_left_out(tmp_path):
    draw = np.random.default_rng(1)
    ordinary = np.exp(draw.normal(4.78, 0.2, 9_860))
    massive = np.geomspace(250, 900, 140)  # begins right above the ordinary ones: no empty stretch lies between
    away = np.square(np.concatenate([ordinary, massive]))
    assert 0.2 < away[9_860:].sum() / away.sum() < 0.3 and ordinary.max() > 235
    found = captured(draw.permutation(np.concatenate([ordinary, massive])), tmp_path)
    kept = found.x.norm(dim=-1)[found.keep]
    assert int((ordinary > found.limit).sum()) <= 10 and kept.max() < 300 and (~found.keep).sum() >= 118
    assert found.norms.massive_variance > 0.2 and found.norms.high_variance < 0.05


@pytest.mark.parametrize("shape", ["normal", "gamma", "dimensions"])
def test_one_group_of_norms_is_left_whole(shape):
    for seed in range(40):
        draw = np.random.default_rng(seed)
        norms = {
            "normal": lambda draw=draw: np.exp(draw.normal(4.8, 0.2, 5_000)),
            "gamma": lambda draw=draw: draw.gamma(9.0, 10.0, 5_000),
            "dimensions": lambda draw=draw: np.sqrt(draw.chisquare(576, 5_000)),
        }[shape]()
        assert norm_limit(norms) == float("inf")


def test_a_single_massive_position_is_found_and_few_positions_have_no_limit():
    norms = np.concatenate([np.random.default_rng(0).normal(120, 20, 3_000), [1_500.0]])
    assert norms[:-1].max() < norm_limit(norms) < 1_500
    assert norm_limit(norms[-10:]) == norm_limit(np.zeros(100)) == norm_limit(np.ones(100)) == float("inf")
    assert norm_limit(norms, 0.0) == float("inf") and norm_limit(norms, 2.0) == pytest.approx(2 * np.median(norms))
