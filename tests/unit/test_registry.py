"""Registries explain themselves; every module of an owning package registers something."""

import ast
from pathlib import Path

import pytest

import evalkit
from evalkit.dictionaries.registry import BASELINES, DICTIONARIES
from evalkit.errors import SuiteError
from evalkit.evaluations.base import EVALUATIONS
from evalkit.judges.base import JUDGES
from evalkit.registry import Registry, near_miss

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


def _imports(path: Path) -> set[str]:
    """Packages of evalkit a module imports when it runs (type-checking imports do not count)."""
    found: set[str] = set()

    def walk(nodes):
        for node in nodes:
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                continue
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("evalkit."):
                found.add(node.module.split(".")[1])
            elif isinstance(node, ast.Import):
                found.update(alias.name.split(".")[1] for alias in node.names if alias.name.startswith("evalkit."))
            walk(ast.iter_child_nodes(node))

    walk([ast.parse(path.read_text())])
    return found


LAYERS = [
    {"errors", "terminal", "version"},
    {"disk", "batching", "caching", "registry"},
    {"config", "hashing", "files", "progress", "user_files", "provenance", "model_names", "outputs", "massive", "statistics"},
    {"suite_file", "draws", "criterion", "assets", "toy", "token_classes", "products", "words", "text_facts"},
    {"models", "text", "arithmetic"},
    {"dictionaries", "judges"},
    {"activations", "training"},
    {"tasks"},
    {"interventions"},
    {"patching"},
    {"evaluations"},
    {"suite"},
    {"runs"},
    {"cli"},
]
"""A module may import from its own layer's package and from earlier layers."""

APART = {"store", "report"}
"""Know nothing of running: they import each other and the first four layers."""


def test_imports_point_one_way():
    level = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    for path in ROOT.rglob("*.py"):
        relative = path.relative_to(ROOT)
        package = relative.parts[0].removesuffix(".py")
        if package in ("__init__", "__main__"):
            continue
        for imported in _imports(path) - {package}:
            if package in APART:
                assert imported in APART or level[imported] <= 3, f"{relative} imports {imported}"
            elif package not in ("runs", "cli"):
                assert imported not in APART, f"{relative} imports {imported}"
                assert level[imported] < level[package], f"{relative} imports {imported}"


def test_modules_stay_small_and_say_what_they_do():
    for path in ROOT.rglob("*.py"):
        source = path.read_text()
        assert len(source.splitlines()) <= 600, path
        if source.strip():
            assert ast.get_docstring(ast.parse(source)), f"{path} has no docstring"
