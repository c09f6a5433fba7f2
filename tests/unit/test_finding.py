"""Features that fire on the last token: the right ones, by density, and clear words where nothing can be found."""

from __future__ import annotations

import pytest
import torch
from suite_case import tiny_suite

from evalkit.cli import main
from evalkit.errors import UsageError
from evalkit.runs.find_features import find, listing, suite_of
from evalkit.runs.workbench import Workbench
from evalkit.suite import load_suite
from evalkit.util.progress import Progress

QUIET = Progress(quiet=True)
TEXT = "the quick brown fox since years"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A finished run: suite file and results file."""
    home = tmp_path_factory.mktemp("finding")
    suite, store = tiny_suite(home), home / "out" / "evalkit.duckdb"
    assert main(["run", str(suite), "--results", str(store), "--quiet", "--only", "reconstruction"]) == 0
    return suite, store


def test_they_are_the_features_active_on_the_last_token_rarest_first(built):
    suite, store = load_suite(built[0]), built[1]
    found = find(suite, store.parent, TEXT, only="SAE", progress=QUIET)
    with Workbench(suite, store.parent, QUIET) as bench:
        sae, score = (
            bench.dictionaries.get(bench.dictionaries.spec("SAE"), suite.hook_points[0]),
            bench.inputs.score(suite.hook_points[0]),
        )
        ids = bench.inputs.model.opened(TEXT)
        codes = sae.encode(bench.inputs.model.activations(torch.tensor([ids]), suite.hook_points[0])[0, -1])
        everywhere = sae.encode(score.kept())
    assert {f.feature for f in found.firings} == set((codes > 0).nonzero()[:, 0].tolist())
    densities = [f.density for f in found.firings]
    assert densities == sorted(densities)
    for f in found.firings:
        assert f.code == pytest.approx(float(codes[f.feature]), rel=1e-4)
        assert f.density == pytest.approx(float((everywhere[:, f.feature] > 0).float().mean()))
        assert f.on_token is None or 0 <= f.on_token <= 1
    assert found.tokens[0] == "<end>" and "".join(found.tokens[1:]) == TEXT  # read behind the BOS, as the scoring text is


def test_limits_hold(built):
    suite, folder = load_suite(built[0]), built[1].parent
    rare = find(suite, folder, TEXT, most_density=0.4, progress=QUIET)
    assert all(f.density <= 0.4 for f in rare.firings)
    few = find(suite, folder, TEXT, limit=1, progress=QUIET)
    assert len(few.firings) == 2, "one for each dictionary"
    assert "feature" in listing(few) and "neurons at" in listing(few)


def test_what_cannot_be_found_is_said(built, tmp_path):
    suite = load_suite(built[0])
    with pytest.raises(UsageError, match="not built yet: SAE, neurons"):
        find(suite, tmp_path, TEXT, progress=QUIET)
    with pytest.raises(UsageError, match="tokens, and the first"):
        find(suite, built[1].parent, "", progress=QUIET)
    with pytest.raises(UsageError, match="no dictionary called 'SEA'"):
        find(suite, built[1].parent, TEXT, only="SEA", progress=QUIET)


def test_the_command_takes_the_suite_of_the_latest_run(built, capsys):
    assert main(["find", "--text", TEXT, "--results", str(built[1]), "--only", "SAE"]) == 0
    said = capsys.readouterr().out
    suite = load_suite(built[0])
    with Workbench(suite, built[1].parent, QUIET) as bench:
        ids = bench.inputs.model.opened(TEXT)
        last = bench.inputs.model.token_strings(ids[-1:])[0]
    assert TEXT.endswith(last) and said.splitlines()[0] == f"last token: {last!r} of {len(ids)}"
    assert "SAE at blocks.0.hook_resid_post" in said and "neurons" not in said
    assert main(["find", str(built[0]), "--text", TEXT, "--results", str(built[1]), "--limit", "1"]) == 0
    assert suite_of(built[0].read_text()).suite.name == "tiny"


def test_without_a_run_the_command_asks_for_a_suite(tmp_path, capsys):
    assert main(["find", "--text", TEXT, "--results", str(tmp_path / "none.duckdb")]) == 5
    assert "evalkit run" in capsys.readouterr().err
