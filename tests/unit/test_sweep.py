"""Sweeps: lists of settings become dictionaries with names that say what varies."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest

from evalkit.errors import SuiteError
from evalkit.training.settings.sweep import _is_list, expand


def names(name: str, **table: object) -> list[str]:
    return [variant.name for variant in expand(name, table, "train")]


def test_a_list_becomes_one_dictionary_for_each_value() -> None:
    variants = expand("SAE", {"features": 64, "k": [2, 4, 8], "lr": 1e-3}, "train")
    assert [variant.name for variant in variants] == ["SAE k=2", "SAE k=4", "SAE k=8"]
    assert [variant.config.own.k for variant in variants] == [2, 4, 8]
    assert {(variant.config.features, variant.config.lr) for variant in variants} == {(64, 1e-3)}


def test_several_lists_give_their_product() -> None:
    assert names("S", k=[1, 2], lr=[1e-3, 0.01]) == ["S k=1 lr=0.001", "S k=1 lr=0.01", "S k=2 lr=0.001", "S k=2 lr=0.01"]
    assert names("S", architecture=["topk", "tied"]) == ["S architecture=topk", "S architecture=tied"]


def test_placeholders_are_filled_in() -> None:
    assert names("TopK-{k}", k=[16, 32]) == ["TopK-16", "TopK-32"]
    assert names("{architecture} {k}", k=[16, 32], seed=[0, 1])[:2] == ["topk 16 seed=0", "topk 16 seed=1"]
    assert names("k is {k}", k=16) == ["k is 16"]
    assert names("SAE (TopK)") == ["SAE (TopK)"]
    assert names("x{{y}}", k=[16, 32]) == ["x{y} k=16", "x{y} k=32"]


def test_seeds_share_the_order_of_the_data() -> None:
    assert [v.config.data_seed for v in expand("S", {"seed": [3, 4]}, "train")] == [3, 3]
    assert [v.config.data_seed for v in expand("S", {"seed": [3, 4], "order": 7}, "train")] == [7, 7]
    assert [v.config.order for v in expand("S", {"seed": 3, "k": [1, 2]}, "train")] == [None, None]


def test_one_value_is_the_plain_config() -> None:
    (variant,) = expand("SAE", {"k": 8}, "train")
    assert (variant.name, variant.config.own.k) == ("SAE", 8)


@pytest.mark.parametrize(
    ("table", "word"),
    [
        ({"k": []}, "empty"),
        ({"k": [2, 2]}, "twice"),
        ({"k": [2, "x"]}, "whole number"),
        ({"q": [2, 3]}, "no setting"),
        ({"k": [2, 0]}, "k = 0"),
        ({"architecture": ["topk", "topq"]}, "topq"),
    ],
)
def test_impossible_sweeps_are_refused(table: dict, word: str) -> None:
    with pytest.raises(SuiteError, match=word):
        expand("SAE", table, "train")


@pytest.mark.parametrize("name", ["S {q}", "S {", "S {k"])
def test_names_that_ask_for_no_setting_are_refused(name: str) -> None:
    with pytest.raises(SuiteError):
        expand(name, {"k": [2, 3]}, "train")


def test_settings_that_are_lists_are_told_apart() -> None:
    @dataclass(frozen=True)
    class Settings:
        parts: tuple[int, ...] = ()
        some: tuple[float, ...] | None = None
        k: int = 1

    hints = {"parts": tuple[int, ...], "some": tuple[float, ...] | None, "k": int | None}
    assert [_is_list(hints[f.name]) for f in dataclasses.fields(Settings)] == [True, True, False]


def test_a_list_setting_is_swept_by_a_list_of_lists() -> None:
    table = {"architecture": "matryoshka", "features": 64}
    key = "fractions"
    value = list(getattr(expand("M", table, "t")[0].config.own, key))
    assert len(expand("M", {**table, key: value}, "t")) == 1
    assert len(expand("M", {**table, key: [value, [*value[:-2], value[-2] + value[-1]]]}, "t")) == 2
