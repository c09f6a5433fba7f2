"""Every writer's autoencoders compute here what they compute in their own library.

``tests/fixtures/sae`` was written by the libraries themselves (``tests/make_sae_fixtures.py``): their files, and beside them what
they make of some inputs. One command shows the table, writer by architecture:

    pytest -q -s tests/unit/test_conformance.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.formats.base import FORMATS, Place
from evalkit.dictionaries.loading import export_dictionary, import_dictionary, recognise
from evalkit.errors import DictionaryError

HOME = Path(__file__).parents[1] / "fixtures" / "sae"
MANIFEST = json.loads((HOME / "cases.json").read_text())
CASES: list[dict[str, str]] = MANIFEST["cases"]
READ = [case for case in CASES if not case["refused"]]
REFUSED = [case for case in CASES if case["refused"]]
TOLERANCE = 1e-5
"""Largest difference, relative to the largest expected value."""

COLUMNS = ("encode", "decode", "reconstruct", "round trip")
UNWRITABLE = {("saelens", "expected_average_checkpoint")}
"""Cases whose own format is refused on the way out: SAELens applies no input scale when it loads a file."""


def title(case: dict[str, str]) -> str:
    return f"{case['writer']}-{case['name']}"


def place(case: dict[str, str]) -> Path:
    return HOME / case["writer"] / case["name"] / case["path"]


def expected(case: dict[str, str]) -> dict[str, torch.Tensor]:
    return load_file(HOME / case["writer"] / case["name"] / "expected.safetensors")


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference, relative to the scale of what is wanted."""
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max() / wanted.abs().max())


def errors(dictionary: Dictionary, wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    """The three functions against the library's. Libraries undo a normalisation of tokens in decode, evalkit in restore."""
    return {
        "encode": error(dictionary.encode(wanted["x"]), wanted["codes"]),
        "decode": error(dictionary.restore(dictionary.decode(wanted["codes"]), wanted["x"]), wanted["decoded"]),
        "reconstruct": error(dictionary.reconstruct(wanted["x"]), wanted["x_hat"]),
    }


def same(a: Dictionary, b: Dictionary) -> bool:
    """Whether two dictionaries agree in kind, settings, identity and every bit of every tensor."""
    first, second = a.tensors(), b.tensors()
    bits = first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    return bits and a.settings() == b.settings() and a.identity == b.identity


Table = dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def table() -> Iterator[Table]:
    """Filled by the tests; printed at the end."""
    rows: Table = {}
    yield rows
    lines = [("writer: case (architecture)", *COLUMNS)]
    lines += [(name, *(row.get(column, "-") for column in COLUMNS)) for name, row in sorted(rows.items())]
    print("\n\n" + "\n".join(f"{line[0]:60}" + "".join(f"{cell:13}" for cell in line[1:]) for line in lines))
    versions = ", ".join(f"{name} {version}" for name, version in MANIFEST["versions"].items())
    print(f"\nlargest difference, relative to the largest value; expectations by {versions}")


def note(table: Table, case: dict[str, str], column: str, text: str) -> None:
    table.setdefault(f"{case['writer']}: {case['name']} ({case['architecture']})", {})[column] = text


@pytest.mark.parametrize("case", READ, ids=title)
def test_computes_what_its_library_computes(case: dict[str, str], table: Table) -> None:
    imported = import_dictionary(place(case))
    assert imported.format == case["writer"]
    assert imported.dictionary.kind == case["kind"]
    found = errors(imported.dictionary, expected(case))
    for column, value in found.items():
        note(table, case, column, f"{value:.0e}")
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("case", CASES, ids=title)
def test_exactly_one_format_recognises_it(case: dict[str, str]) -> None:
    found = [name for name in FORMATS.names() if FORMATS.get(name).recognise(Place(place(case)))]
    assert found == [case["writer"]]
    assert recognise(Place(place(case))) == case["writer"]


@pytest.mark.parametrize("case", [c for c in READ if c["kind"] in FORMATS.get(c["writer"]).writes], ids=title)
def test_written_and_read_back_it_is_the_same_to_the_bit(case: dict[str, str], table: Table, tmp_path: Path) -> None:
    dictionary = import_dictionary(place(case)).dictionary
    if (case["writer"], case["name"]) in UNWRITABLE:
        with pytest.raises(DictionaryError, match="scale"):
            export_dictionary(dictionary, tmp_path / "out", case["writer"])
        assert not (tmp_path / "out").exists()
        return note(table, case, "round trip", "refused")
    back = import_dictionary(export_dictionary(dictionary, tmp_path / "out", case["writer"]))
    exact = back.format == case["writer"] and same(dictionary, back.dictionary)
    note(table, case, "round trip", "exact" if exact else "DIFFERS")
    assert exact
    assert max(errors(back.dictionary, expected(case)).values()) < TOLERANCE
    assert back.dictionary.hook_point == dictionary.hook_point
    assert back.dictionary.model == dictionary.model


@pytest.mark.parametrize("case", READ, ids=title)
def test_every_format_that_takes_it_keeps_its_identity(case: dict[str, str], tmp_path: Path) -> None:
    """Into each format that writes its kind: the same function comes back, or nothing is written and the reason is said."""
    dictionary = import_dictionary(place(case)).dictionary
    exact = []
    for name in FORMATS.names():
        if dictionary.kind not in FORMATS.get(name).writes:
            continue
        try:
            back = import_dictionary(export_dictionary(dictionary, tmp_path / name, name))
        except DictionaryError as refusal:
            assert refusal.what and refusal.fix
            assert not (tmp_path / name).exists()
            continue
        assert back.format == name
        assert back.dictionary.identity.hash == dictionary.identity.hash
        assert max(errors(back.dictionary, expected(case)).values()) < TOLERANCE
        exact.append(name)
    assert "evalkit" in exact
    settings = dictionary.settings()
    if not settings.keys() & {"normalise", "scale", "decoder_norm"}:
        subtracts = settings.get("subtract_b_dec", True)
        # dictionary_learning has both forms of relu, and one of each other architecture
        both = dictionary.kind == "relu" or subtracts == (dictionary.kind != "jumprelu")
        assert {"saelens", *(["dictionary_learning"] if both else [])} <= set(exact)


@pytest.mark.parametrize("case", REFUSED, ids=title)
def test_what_is_no_autoencoder_of_ours_is_refused_with_its_reason(case: dict[str, str]) -> None:
    with pytest.raises(DictionaryError, match=f"(?i){case['refused']}") as refusal:
        import_dictionary(place(case))
    assert refusal.value.what and refusal.value.where and refusal.value.fix


GROUPS = sorted({case["group"] for case in READ if case["group"]})


@pytest.mark.parametrize("group", GROUPS)
def test_one_function_has_one_identity_whoever_wrote_it(group: str) -> None:
    members = [case for case in READ if case["group"] == group]
    assert len({case["writer"] for case in members}) > 1
    hashes = {title(case): import_dictionary(place(case)).dictionary.identity.hash for case in members}
    assert len(set(hashes.values())) == 1, hashes


def test_different_functions_have_different_identities() -> None:
    hashes = {group: next(_hash(case) for case in READ if case["group"] == group) for group in GROUPS}
    assert len(set(hashes.values())) == len(GROUPS) == 6, hashes


def _hash(case: dict[str, str]) -> str:
    return import_dictionary(place(case)).dictionary.identity.hash


SQUARE = [case for case in READ if case["name"].endswith("square")]


@pytest.mark.parametrize("case", SQUARE, ids=title)
@pytest.mark.parametrize("name", ["W_enc", "W_dec"])
def test_a_wrong_transpose_that_shapes_cannot_tell_would_be_seen(case: dict[str, str], name: str) -> None:
    right = import_dictionary(place(case)).dictionary
    tensors = right.tensors()
    wrong = type(right).build({**tensors, name: tensors[name].T.contiguous()}, right.settings())
    assert max(errors(wrong, expected(case)).values()) > 1000 * TOLERANCE


@pytest.mark.parametrize("case", READ, ids=title)
def test_a_wrong_subtraction_of_b_dec_would_be_seen(case: dict[str, str]) -> None:
    right = import_dictionary(place(case)).dictionary
    settings = right.settings()
    settings["subtract_b_dec"] = not settings.get("subtract_b_dec", True)
    assert max(errors(type(right).build(right.tensors(), settings), expected(case)).values()) > 1000 * TOLERANCE


def test_every_writer_has_its_architectures_and_a_square_case() -> None:
    covered: dict[str, set[str]] = {}
    for case in READ:
        covered.setdefault(case["writer"], set()).add(case["architecture"])
    assert covered == {
        "saelens": {"standard", "topk", "jumprelu", "gated", "batchtopk", "matryoshka_batchtopk"},
        "dictionary_learning": {
            "AutoEncoder",
            "AutoEncoderNew",
            "GatedAutoEncoder",
            "AutoEncoderTopK",
            "BatchTopKSAE",
            "MatryoshkaBatchTopKSAE",
            "JumpReluAutoEncoder",
        },
        "sparsify": {"topk"},
    }
    assert {case["writer"] for case in SQUARE} == set(covered)


@pytest.mark.parametrize("case", [case for case in READ if case["kind"] == "topk" and case not in SQUARE], ids=title)
def test_topk_inputs_reach_tokens_with_fewer_than_k_active(case: dict[str, str]) -> None:
    """Otherwise a TopK that forgets its ReLU would pass; per-token normalisation makes all tokens alike."""
    active = (expected(case)["codes"] > 0).sum(-1)
    dictionary: Any = import_dictionary(place(case)).dictionary
    assert int(active.max()) == dictionary.k
    assert int(active.min()) < dictionary.k or dictionary.wiring.normalise == "layer_norm"
