"""Captures: the BOS and first positions are never kept, and what is not finite is said and not left out."""

from __future__ import annotations

import pytest
import torch

from evalkit.activations.capture import ExclusionConfig, capture
from evalkit.activations.fragments import fragment_lists
from evalkit.dictionaries.neurons import Neurons
from evalkit.errors import ModelError
from evalkit.models.language_model import LanguageModel
from evalkit.progress import Progress
from evalkit.text.corpora import Document
from evalkit.text.windows import cut_windows
from evalkit.text_facts import capture_line, left_out, text_line

HOOK = "blocks.0.hook_resid_post"
QUIET = Progress(quiet=True)


class Model(LanguageModel):
    """Activations of width 4 that tell a token by its number; the tokens of ``special`` have others."""

    def __init__(self, special: dict[int, float], dtype: torch.dtype = torch.float32) -> None:
        self.special, self.dtype = special, dtype
        self.identity = f"{sorted(special.items())} {dtype}"

    def width(self, hook_point: str) -> int:
        return 4

    def activations(self, tokens: torch.Tensor, hook_point: str) -> torch.Tensor:
        x = (tokens % 5 + 1.0)[..., None].repeat(1, 1, 4)
        for token, value in self.special.items():
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
    found = capture(Model({ord("c"): 1e3}), text, HOOK, ExclusionConfig(), tmp_path, QUIET, name="text")
    massive = int((text.tokens[:, 2:] == ord("c")).sum())
    assert massive and left_out(found) == (20, 20, massive)
    assert capture_line("score", HOOK, found) == (
        f"scoring text at {HOOK}: {200 - massive} of 240 positions kept; left out: 20 BOS, 20 first, {massive} massive"
    )
