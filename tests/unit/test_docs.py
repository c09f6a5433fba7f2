"""The pages of docs/: their code runs, their suite is one, and they name what there is."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest
from suite_case import tiny_suite

import evalkit
from evalkit.cli import main
from evalkit.evaluations.base import EVALUATIONS
from evalkit.suite import parse_suite

ROOT = Path(evalkit.__file__).parents[1]
DOCS = ROOT / "docs"


def block(page: str, language: str) -> str:
    """The first fenced block of ``language`` on a page."""
    match = re.search(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.S)
    assert match, page
    return match[1]


def test_links_between_pages_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_of_docs_is_named_in_the_readme():
    text = (ROOT / "README.md").read_text()
    for page in DOCS.glob("*.md"):
        assert f"(docs/{page.name})" in text, page.name


def test_the_readme_names_every_evaluation():
    text = (ROOT / "README.md").read_text()
    for name in EVALUATIONS.names():
        assert f"| `{name}` |" in text, name


def test_the_suite_on_its_page_is_understood(tmp_path: Path):
    suite = parse_suite(tomllib.loads(block("suite-file.md", "toml")), path=tmp_path / "mine.toml", text="")
    assert [spec.name for spec in suite.dictionaries][-2:] == ["published", "PCA"]


def test_the_evaluation_on_its_page_runs_from_outside_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    source = block("own-evaluation.md", "python")
    assert len(source.splitlines()) <= 60
    (tmp_path / "main_token.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(EVALUATIONS, "_items", dict(EVALUATIONS._items))
    monkeypatch.delitem(sys.modules, "main_token", raising=False)
    suite = tiny_suite(tmp_path, extra="\n" + block("own-evaluation.md", "toml"))
    store = tmp_path / "out" / "evalkit.duckdb"
    command = ["run", str(suite), "--plugin", "main_token", "--only", "main_token", "--results", str(store), "--quiet"]
    assert main(command) == 0
    assert "share" in capsys.readouterr().out
    with evalkit.open_results(store) as results:
        frame = results.table("main_token")
    assert ((frame["mean"] > 0) & (frame["mean"] <= 1)).all() and (frame["n"] > 1).all()


def test_the_page_of_the_store_names_every_table_and_view():
    text = (DOCS / "store.md").read_text()
    schema = "\n".join(file.read_text() for file in sorted((ROOT / "evalkit/store/schema").glob("*.sql")))
    names = set(re.findall(r"CREATE (?:OR REPLACE )?(?:TABLE|VIEW|MACRO) (\w+)", schema))
    assert len(names) > 30
    assert not [name for name in sorted(names) if not re.search(rf"`{name}[`(]", text)]


def test_the_map_of_the_house_names_every_package_and_paths_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    packages = [path.parent.name for path in (ROOT / "evalkit").glob("*/__init__.py")]
    assert not [name for name in packages if f"`{name}/`" not in text]
    for name in re.findall(r"`([a-z_/]+(?:/|\.py))`", text):
        # parts of a package are named as its row begins
        assert (ROOT / "evalkit" / name).exists() or (ROOT / name).exists() or list((ROOT / "evalkit").glob(f"*/{name}")), name
