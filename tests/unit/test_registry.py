"""Registries explain themselves; every module of an owning package registers something."""

import ast
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

import evalkit
from evalkit.dictionaries.registry import BASELINES, DICTIONARIES
from evalkit.errors import SuiteError
from evalkit.evaluations.base import EVALUATIONS
from evalkit.judges.base import JUDGES
from evalkit.util.registry import Registry, near_miss

ROOT = Path(evalkit.__file__).parent


def test_unknown_name_gives_the_near_miss_and_the_list():
    with pytest.raises(SuiteError) as caught:
        EVALUATIONS.get("autointrep", "suite.toml [[evaluation]]")
    assert "did you mean 'autointerp'?" in str(caught.value)
    assert "reconstruction" in caught.value.fix
    assert caught.value.where == "suite.toml [[evaluation]]"


def test_near_misses_are_the_same_in_upper_and_lower_case():
    assert near_miss("Pca", ["pca", "ica"]).startswith("did you mean 'pca'?")
    assert near_miss("fvu", ["FVU", "L0"]).startswith("did you mean 'FVU'?")
    assert near_miss("SAE (TOPK)", ["SAE (TopK)", "neurons"]).startswith("did you mean 'SAE (TopK)'?")


def test_near_miss_without_a_close_name_lists_only():
    assert near_miss("zzz", ["pca", "ica"]) == "known: ica, pca"


def test_same_name_twice_is_an_error():
    registry: Registry[type] = Registry("thing", "evalkit.evaluations", SuiteError)
    registry.register("a")(int)
    with pytest.raises(ValueError, match="two things are called 'a'"):
        registry.register("a")(str)


def test_what_the_registries_hold():
    assert EVALUATIONS.names() == [
        "ablation",
        "autointerp",
        "causal_tree",
        "concepts",
        "geometry",
        "inputs",
        "ioi",
        "prediction",
        "reconstruction",
        "steering",
    ]
    assert {"local", "openai", "lexical", "scripted"} == set(JUDGES.names())
    assert {"pca", "ica", "neurons", "random", "rotation"} <= set(BASELINES.names())
    saes = {"relu", "tied", "gated", "topk", "batchtopk", "jumprelu", "matryoshka"}
    assert saes | {"pca", "ica", "nmf", "neurons", "random", "rotation", "identity", "mean"} == set(DICTIONARIES.names())


def test_every_evaluation_documents_its_metrics_and_points_to_real_nulls():
    for name in EVALUATIONS.names():
        evaluation = EVALUATIONS.get(name)
        assert evaluation.name == name
        assert sum(metric.main for metric in evaluation.metrics.values()) == 1
        for metric in evaluation.metrics.values():
            assert metric.note, metric.title
            assert not metric.null or metric.null in evaluation.metrics


def test_imports_point_one_way_and_make_no_circle(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT.parent)
    assert lint_imports(no_cache=True, no_logo=True) == 0


def test_no_module_has_a_name_that_begins_with_a_siblings():
    for folder in {path.parent for path in ROOT.rglob("*.py")}:
        modules = [path for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
        names = {path.name.removesuffix(".py") for path in modules}
        assert not [(a, b) for a in names for b in names if b.startswith(f"{a}_")], folder


def test_modules_stay_small_and_say_what_they_do():
    for path in ROOT.rglob("*.py"):
        source = path.read_text()
        assert len(source.splitlines()) <= 600, path
        if source.strip():
            assert ast.get_docstring(ast.parse(source)), f"{path} has no docstring"
