"""The page of a run: what stands in it, that nothing in a results file can break it, and what is said where there is none."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest
from page_case import AGREES, ANCHOR, DIFFERS, EVIL, EXPLANATION, LATE, PARENT_ANCHOR, RUN, SAE, TOKENS, write_case
from store_case import write_run

from evalkit.cli import main
from evalkit.errors import DiskFull, StoreUnreadable, UsageError
from evalkit.report.page.feature_list import _anchors
from evalkit.report.page.write import page, write_page
from evalkit.report.tables import paper_sheet
from evalkit.report.views.autointerp import fragments
from evalkit.store.migrations import migrate
from evalkit.store.reader import open_results
from evalkit.store.writer import rebuild

VOID = {"meta", "link", "input", "img", "br"}


class Read(HTMLParser):
    """What a browser would find: tags in order, attributes, tables as rows of texts, and the text of everything with an id."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.tables: list[dict[str, list]] = []
        self.texts: dict[str, str] = {}
        self._open: list[tuple[str, dict[str, str]]] = []
        self.feed(html)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag, attributes):
        found = {name: value or "" for name, value in attributes}
        self.tags.append((tag, found))
        if tag == "table":
            self.tables.append({"caption": [""], "rows": []})
        if tag == "tr":
            self.tables[-1]["rows"].append([])
        if tag in ("td", "th"):
            self.tables[-1]["rows"][-1].append("")
        if tag not in VOID:
            self._open.append((tag, found))

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, {name: value or "" for name, value in attributes}))

    def handle_endtag(self, tag):
        opened, _ = self._open.pop()
        assert opened == tag, f"</{tag}> closes <{opened}>"

    def handle_data(self, data):
        inside = [tag for tag, _ in self._open]
        for _, attributes in self._open:
            if name := attributes.get("id"):
                self.texts[name] = self.texts.get(name, "") + data
        if "td" in inside or "th" in inside:
            self.tables[-1]["rows"][-1][-1] += data
        elif "caption" in inside:
            self.tables[-1]["caption"][0] += data

    def of(self, tag):
        """Attributes of every element of one kind."""
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return write_case(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def html(home):
    with open_results(home) as store:
        return write_page(store).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def read(html):
    return Read(html)


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """A run without case studies, one unit of which failed."""
    folder = tmp_path_factory.mktemp("paper")
    write_run(folder)
    rebuild(folder, folder / "evalkit.duckdb")
    return folder / "evalkit.duckdb"


def rows_of(read, caption):
    return [row for table in read.tables if table["caption"][0].startswith(caption) for row in table["rows"]]


def test_the_head_says_what_the_run_was(read):
    said = read.texts["run"]
    assert "partial; 7 units done, 1 failed" in said and "2026-03-01 12:00:00 to 2026-03-01 12:30:00 UTC" in said
    assert "tiny" in said and "torch 2" in said and RUN in said and "0.1.0" in said
    assert [row[:2] for row in rows_of(read, "dictionaries")[1:]] == [[SAE, LATE], [SAE, "blocks.2.hook_resid_post"]]


def test_what_failed_is_shown_with_counts_and_reasons(read, paper):
    assert "1 of 8 units failed" in read.texts["missing"] and f"out of memory {EVIL}" in read.texts["missing"]
    assert "There is nothing" not in read.texts["missing"] and "No unit left a score" in read.texts["evaluation-7"]
    with open_results(paper) as store:
        found = Read(page(store, store.run_id()))
    rows = rows_of(found, "failed and undefined")[1:]
    assert ["unit failed", "autointerp", "ica", "blocks.3.hook_resid_post", "-", "1", "the judge went away"] in rows
    assert ["explanation failed", "autointerp", "topk", "blocks.3.hook_resid_post", "-", "1", "time-out"] in rows
    assert ["score undefined", "autointerp", "topk", "blocks.3.hook_resid_post", "score 1", "1", "-"] in rows
    assert ["judge call failed", "-", "-", "-", "simulate 1", "1", "time-out"] in rows
    (windows,) = [row for row in rows if row[1:3] == ["reconstruction", "pca"]]
    assert windows[4:6] == ["fvu 1, perplexity 1", "2"]


def test_tables_have_the_numbers_of_the_command(paper):
    with open_results(paper) as store:
        found = Read(page(store, store.run_id()))
        sheets = {name: paper_sheet(store.table(name)) for name in ("reconstruction", "autointerp")}
    for name, sheet in sheets.items():
        rows = rows_of(found, f"{name}, at")
        assert rows[0] == [column.heading for column in sheet.columns]
        assert rows[1:] == [list(row) for row in zip(*([cell.text for cell in c.cells] for c in sheet.columns), strict=True)]
        assert all(note in found.texts[f"evaluation-{1 + list(sheets).index(name)}"] for note in sheet.all_notes("Bold"))
    assert "0.4250" in rows_of(found, "reconstruction, at")[2]


def test_a_run_without_case_studies_is_a_page_too(paper):
    with open_results(paper) as store:
        found = Read(page(store, store.run_id()))
    assert "features" not in found.texts and {"run", "missing", "evaluation-1", "evaluation-2"} <= set(found.texts)
    assert len([svg for svg in found.of("svg") if svg.get("role") == "img"]) == 2
    assert [row[:4] for row in rows_of(found, "judge calls")[1:]] == [
        ["tiny-judge", "explain", "3", "0"], ["tiny-judge", "simulate", "1", "1"],
    ]  # fmt: skip


def test_features_that_agree_come_first_and_say_why(read, html):
    features = [attributes for attributes in read.of("details") if attributes.get("class", "").startswith("feature")]
    assert [("agrees" in attributes["class"]) for attributes in features] == [True, False, False]
    assert list(features[0]) == ["class", "data-find", "open"] and "open" not in features[1]
    assert re.findall(r'<span class="(yes|no|none)">(\w+): ([\w ]+)</span>', html) == [
        ("yes", "inputs", "yes"), ("yes", "effect", "yes"), ("yes", "tree", "yes"),
        ("yes", "inputs", "yes"), ("no", "effect", "no"), ("none", "tree", "not there"),
    ]  # fmt: skip
    assert "3 of 3 features" in read.texts["features"] and "(1 in this run)" in read.texts["features"]
    links = [attributes["href"] for attributes in read.of("a")]
    assert links.count(f"#{ANCHOR}") >= 2, "the table of stories leads there"


def test_a_section_has_every_side(read, html):
    said = read.texts[ANCHOR]
    assert "0.2000 nats (random directions 0.1000)" in said and "0.60 of its activation goes with" in said
    assert "-0.500 [" in said and EXPLANATION.replace("\u0007", "\u25a1") in said
    tenths = [row for row in rows_of(read, "The bar is logarithmic")[1:] if row[0] == "9.00 to 10.00"]
    assert tenths[0][:4] == ["9.00 to 10.00", "100", "0.75", "0.75"] and "' 75%" in tenths[0][4]
    effects = rows_of(read, "Change of the log-probability")
    assert [row[0] for row in effects[1:8]] == [
        "lowered",
        "'",
        EVIL,
        "\ufffd",
        "\u2423\u05e9\u05dc\u05d5\u05dd",
        TOKENS[8],
        "raised",
    ]
    assert effects[2] == ["'", "", "-0.500 [-0.625, -0.375]", "-0.0500", "-0.250"]
    assert 'title="activation 9.50">&lt;script&gt;' in html and ">9.50</span>" in html, "shading and a number that can be read"
    assert 'style="--a:0.138" title="activation 1.00">to</mark>' in html, "of a fragment, each token has its activation"


def test_trees_are_drawn_and_their_nodes_lead_to_sections(read, html):
    (tree,) = re.findall(r'<svg [^>]*aria-label="Causal tree of feature 3 .*?</svg>', html, flags=re.DOTALL)
    found = Read(tree)
    assert [attributes["href"] for attributes in found.of("a")] == [f"#{PARENT_ANCHOR}"]
    assert len(found.of("rect")) == 4 and len(found.of("line")) == 3, "the three largest parents"
    assert ">60% (20%)</text>" in tree and ">4/3</text>" in tree and ">2/21</text>" in tree
    assert "3 significant edges are shown; 1 weaker ones are left out" in read.texts[ANCHOR]
    width, height = (float(found.of("svg")[0][name]) for name in ("width", "height"))
    for box in found.of("rect"):
        assert float(box["x"]) >= 0 and float(box["x"]) + float(box["width"]) <= width
        assert float(box["y"]) >= 0 and float(box["y"]) + float(box["height"]) <= height
    assert rows_of(read, "Share of the child")[1][:6] == [
        "2/21", "4/3", f"{EVIL} \u25a1\u25a1[31m \u2423word", "0.60 [0.50, 0.70]", "0.20", "0.0100",
    ]  # fmt: skip


def test_replies_stand_side_by_side(read, html):
    rows = rows_of(read, "It is <up> to")
    assert rows[0] == ["condition", "the feature", "another feature", "a random direction"]
    assert rows[1] == ["clamp 2 times", f"Dave Dave </mark> {EVIL}", "no one", "-"]
    assert rows[2] == ["steer 2 times", "as clamped", "somebody", "(nothing)"]
    assert html.count('<mark class="word">Dave</mark>') == 6, (
        "the feature's words, twice in each clamped reply and once unchanged"
    )


def test_what_a_feature_tells_is_shown_with_its_strongest_held_out_texts(read):
    assert "Tells names <of>" in read.texts[ANCHOR] and "AUROC 0.90 on 24 held-out texts (p 0.0100, Holm)" in read.texts[ANCHOR]
    assert rows_of(read, "Largest activation in a text")[1:] == [["6.50", "does not", EVIL], ["4.00", "shows it", "Dave"]]


def test_anchors_are_never_shared():
    found = _anchors([("SAE (k)", "h", 1), ("sae k", "h", 1), ("\u5b57", "h", 1), ("sae-k-h", "1", 2), ("SAE (k)", "h-1", 2)])
    assert list(found.values()) == ["sae-k-h-1", "sae-k-2-h-1", "dictionary-h-1", "sae-k-h-1-2", "sae-k-h-1-2-2"]


def test_nothing_in_a_results_file_breaks_the_page(read, html):
    assert len(read.of("script")) == 1 and len(read.of("style")) == 1 and not read.of("img")
    assert not [name for _, attributes in read.tags for name in attributes if name.startswith("on")]
    assert not [letter for letter in html if not letter.isprintable() and letter != "\n"]
    ids = Counter(attributes["id"] for _, attributes in read.tags if "id" in attributes)
    assert set(ids.values()) == {1}
    for _, attributes in read.tags:
        if attributes.get("href", "").startswith("#"):
            assert attributes["href"][1:] in ids
        for name in re.findall(r"url\(#([^)]*)\)", " ".join(attributes.values())):
            assert name in ids
        assert all(name in ids for name in attributes.get("aria-labelledby", "").split())


def test_the_page_asks_for_nothing(read, html):
    for tag, attributes in read.tags:
        for name in ("src", "href", "xlink:href", "action", "poster", "data", "srcset"):
            if name in attributes:
                assert attributes[name].startswith("#") or (tag, attributes[name]) == ("link", "data:,")
    assert "@import" not in html and not re.search(r"url\((?!#)", html) and not re.search(r"https?://|//[a-z]+\.", html)
    (policy,) = [meta["content"] for meta in read.of("meta") if "content" in meta and "default-src" in meta["content"]]
    assert policy.startswith("default-src 'none'")


def test_headings_and_tables_can_be_read_aloud(read):
    assert read.of("html")[0]["lang"] == "en" and "title" in [tag for tag, _ in read.tags]
    levels = [int(tag[1]) for tag, _ in read.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(below <= above + 1 for above, below in zip(levels, levels[1:], strict=False))
    assert all(table["caption"][0].strip() for table in read.tables)
    assert all(attributes.get("scope") in ("col", "row", "rowgroup") for attributes in read.of("th"))
    assert all(a.get("aria-label") or a.get("aria-hidden") or a.get("aria-labelledby") for a in read.of("svg"))


def test_one_results_file_gives_one_page(home, html, tmp_path):
    with open_results(home) as store:
        again = write_page(store, tmp_path / "again.html")
    assert again.read_text(encoding="utf-8") == html
    with open_results(write_case(tmp_path / "elsewhere")) as store:
        assert page(store, RUN) == html


def test_what_is_left_out_is_said(home):
    with open_results(home) as store:
        one, none = (Read(page(store, RUN, most)) for most in (1, 0))
    assert "1 of 3 features of this run are shown; 2 are left out" in one.texts["features"]
    assert ANCHOR in one.texts and PARENT_ANCHOR not in one.texts
    assert not [a for a in one.of("a") if a["href"] == f"#{PARENT_ANCHOR}"], "nothing leads to a section that is not there"
    assert "0 of 3 features of this run are shown; 3 are left out" in none.texts["features"] and "filter" not in none.texts


def test_why_there_are_no_stories_is_said(home, monkeypatch):
    def fail(*_):
        raise UsageError("inputs and ablation share no feature")

    monkeypatch.setattr("evalkit.report.page.feature_list.stories", fail)
    with open_results(home) as store:
        found = Read(page(store, RUN))
    assert "There are no stories: inputs and ablation share no feature." in found.texts["features"]
    assert str(AGREES) in found.texts["features"] and str(DIFFERS) in found.texts["features"]


def test_the_command_writes_beside_the_results_and_where_it_is_told(home, tmp_path, capsys):
    assert main(["report", "--results", str(home)]) == 0
    assert capsys.readouterr().out == f"{home.parent / 'report.html'}\n"
    other = tmp_path / "a page.html"
    assert main(["report", "--results", str(home), "--run", "cases", "--features", "1", "-o", str(other)]) == 0
    assert "2 are left out" in other.read_text(encoding="utf-8")


def test_refusals(home, tmp_path, capsys, monkeypatch):
    def refused(*words):
        code = main(["report", "--results", str(home), *map(str, words)])
        return code, capsys.readouterr().err

    assert refused("--run", "case")[0] == 2 and "did you mean 'cases'?" in refused("--run", "case")[1]
    code, said = refused("-o", tmp_path / "no" / "page.html")
    assert code == 2 and "does not exist" in said and str(tmp_path / "no") in said
    code, said = refused("-o", tmp_path)
    assert code == 2 and "this is a folder" in said and str(tmp_path / "report.html") in said
    code, said = refused("-o", tmp_path / ("x" * 300))
    assert code == 2 and "cannot be written: File name too long" in said
    code, said = refused("--features", "-1")
    assert code == 2 and "--features" in said
    monkeypatch.setattr("os.access", lambda path, _: Path(path) != tmp_path)
    code, said = refused("-o", tmp_path / "page.html")
    assert code == 2 and "cannot be written: Permission denied" in said
    assert list(tmp_path.iterdir()) == []


def test_where_there_is_nothing_yet(tmp_path):
    with pytest.raises(StoreUnreadable):
        open_results(tmp_path / "none.duckdb")
    with duckdb.connect(str(tmp_path / "empty.duckdb")) as connection:
        migrate(connection, 0)
    with open_results(tmp_path / "empty.duckdb") as store, pytest.raises(UsageError, match="no run yet"):
        write_page(store)
    assert not (tmp_path / "report.html").exists()


def test_a_full_disk_leaves_the_page_that_was_there(home, tmp_path, monkeypatch):
    target = tmp_path / "report.html"
    target.write_text("before")

    def full(*_args, **_more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with open_results(home) as store, pytest.raises(DiskFull, match="No space left on device.* free") as caught:
        write_page(store, target, features=0)
    assert caught.value.where == str(target)
    assert target.read_bytes() == b"before" and list(tmp_path.iterdir()) == [target]


def test_positions_left_out_of_a_fragment_are_not_shaded():
    row = {"part": "top", "fragment": 0, "tokens": ["a", "b", "c"], "actual": np.array([np.nan, 4.0, 2.0])}
    empty = {"part": "top", "fragment": 1, "tokens": ["a"], "actual": np.array([np.nan])}
    (shown,) = fragments(pd.DataFrame([row, empty]))
    assert shown.value == "4.00" and [(one.share, one.value) for one in shown.text] == [(0.0, "-"), (1.0, "4.00"), (0.5, "2.00")]
