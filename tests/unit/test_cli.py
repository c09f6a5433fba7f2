"""What a newcomer types, mistypes and reads."""

import json
import shlex
import subprocess
import sys

import pytest
from suite_case import tiny_suite

import evalkit
from evalkit.cli import main
from evalkit.cli.entry import GROUPS
from evalkit.cli.parser import parse
from evalkit.errors import StoreError
from evalkit.evaluations.base import EVALUATIONS


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished tiny run: its suite and its results file."""
    home = tmp_path_factory.mktemp("cli")
    suite, store = tiny_suite(home), home / "out" / "evalkit.duckdb"
    assert main(["run", str(suite), "--results", str(store), "--quiet"]) == 0
    return suite, store


def typed(capsys, *words):
    code = main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    return stopped.value.code, capsys.readouterr().err


def test_a_mistyped_command_names_the_near_miss(capsys):
    code, said = refused(capsys, "tabel", "autointerp")
    assert code == 2
    assert "did you mean 'table'?" in said


def test_a_mistyped_choice_names_the_near_miss(capsys):
    code, said = refused(capsys, "show", "run")
    assert code == 2
    assert "did you mean 'runs'?" in said


def test_the_help_lists_the_commands_by_group(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert stopped.value.code == 0
    places = [lines.index(f"{title}:") for title in (*GROUPS, "options")]
    for (title, commands), begin, end in zip(GROUPS.items(), places, places[1:], strict=False):
        listed = [line.split()[0] for line in lines[begin + 1 : end] if line.startswith("  ") and line[2] != " "]
        assert listed == list(commands), title


def test_bash_completes_commands_choices_options_and_files(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main(["--show-completion", "bash"])
    script = tmp_path / "evalkit.bash"
    script.write_text(capsys.readouterr().out)
    (tmp_path / "own.toml").touch()
    assert stopped.value.code == 0

    def completed(*words):
        typed = shlex.join(("evalkit", *words))
        asked = f"source {script}; COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _shtab_evalkit; echo ${{COMPREPLY[@]}}"
        done = subprocess.run(["bash", "-c", asked], cwd=tmp_path, capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    assert completed("re") == {"report", "rebuild"}
    assert completed("show", "ru") == {"runs"}
    assert completed("run", "--pl") == {"--plugin"}
    assert completed("run", "ow") == completed("table", "x", "--results", "ow") == {"own.toml"}


@pytest.mark.parametrize(("shell", "name"), [("bash", "evalkit"), ("zsh", "_evalkit"), ("fish", "evalkit.fish")])
def test_completion_is_written_where_the_shell_looks(capsys, tmp_path, monkeypatch, shell, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", f"/usr/bin/{shell}")
    for variable in ("XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(SystemExit) as stopped:
        main(["--install-completion"])
    (path,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert stopped.value.code == 0 and path.name == name and "evalkit" in path.read_text()
    assert str(path) in capsys.readouterr().out


def test_what_completion_cannot_do_is_one_clear_message(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("SHELL", "/bin/csh")
    code, _, said = typed(capsys, "--show-completion")
    assert code == 2 and "'csh'" in said and "bash, zsh, fish" in said
    code, said = refused(capsys, "--show-completion", "bsh")
    assert code == 2 and "did you mean 'bash'?" in said
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    (tmp_path / "file").touch()
    code, _, said = typed(capsys, "--install-completion", "fish")
    assert code == 2 and "the completion script cannot be written" in said and "evalkit.fish" in said


def test_the_home_folder_of_nobody_is_one_clear_message(capsys):
    code, _, said = typed(capsys, "run", "~no-such-user/suite.toml")
    assert code == 2 and "there is no such home folder" in said and "Traceback" not in said


def test_a_missing_suite_is_one_clear_message(capsys):
    code, out, said = typed(capsys, "run", "suites/quikstart.toml")
    assert code == 2
    assert "did you mean 'quickstart.toml'?" in said
    assert "Traceback" not in said


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    typed = parse(GROUPS, ["report", "--results=~/evalkit.duckdb", "-o", "~/page.html"])
    assert (typed.results, typed.output) == (tmp_path / "evalkit.duckdb", tmp_path / "page.html")
    assert parse(GROUPS, ["run", "~/suite.toml"]).suite == tmp_path / "suite.toml"
    with pytest.raises(StoreError) as caught:
        evalkit.open_results("~/absent.duckdb")
    assert str(tmp_path) in str(caught.value)


def test_debug_shows_the_traceback(capsys):
    code, _, said = typed(capsys, "run", "nowhere.toml", "--debug")
    assert code == 2
    assert "Traceback" in said


def test_no_results_yet(capsys, tmp_path):
    code, _, said = typed(capsys, "table", "autointerp", "--results", tmp_path / "none.duckdb")
    assert code == 5
    assert "evalkit run" in said


def test_run_prints_tables_figures_and_where_everything_is(capsys, done):
    suite, store = done
    code, out, _ = typed(capsys, "run", suite, "--results", store, "--quiet")
    assert code == 0
    assert "top-and-random r" in out
    assert "0 units done now, 4 before" in out
    for name in ("reconstruction", "autointerp"):
        (figure,) = store.parent.glob(f"figures/*-{name}.png")
        assert str(figure) in out
        assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["autointerp", "reconstruction"])
def test_tables_in_every_format(capsys, done, name):
    _, store = done
    for form in ("text", "md", "latex", "csv", "json"):
        code, out, _ = typed(capsys, "table", name, "--results", store, "--format", form)
        assert code == 0
        assert "neurons" in out
    records = json.loads(out)
    assert {record["dictionary"] for record in records} == {"SAE", "neurons"}


def test_an_unknown_table_and_dictionary_name_the_near_miss(capsys, done):
    _, store = done
    code, _, said = typed(capsys, "table", "autointrep", "--results", store)
    assert (code, "autointerp" in said) == (2, True)
    code, _, said = typed(capsys, "compare", "SAE", "neuron", "--results", store)
    assert code == 2
    assert "did you mean 'neurons'?" in said


def test_compare_show_figure_plan_rebuild_and_suite(capsys, done, tmp_path):
    suite, store = done
    assert "difference" in typed(capsys, "compare", "SAE", "neurons", "--results", store)[1]
    for what in ("runs", "dictionaries", "failures", "costs"):
        code, out, _ = typed(capsys, "show", what, "--results", store)
        assert code == 0
        assert out.strip()
    svg = tmp_path / "f.svg"
    assert typed(capsys, "figure", "reconstruction", "-o", svg, "--results", store)[0] == 0
    assert "<svg" in svg.read_text()
    code, out, _ = typed(capsys, "plan", suite, "--results", store)
    assert code == 0
    assert "to run: 0 of 4 units" in out
    assert typed(capsys, "rebuild", "--results", store)[0] == 0
    assert "fine" in typed(capsys, "suite", suite)[1]


def test_a_plan_before_anything_ran_runs_nothing(capsys, done, tmp_path):
    suite, _ = done
    store = tmp_path / "new" / "evalkit.duckdb"
    code, out, _ = typed(capsys, "plan", suite, "--results", store)
    assert code == 0
    assert "to run: 4 of 4 units" in out
    assert not store.parent.exists()


def test_suite_help_is_the_reference(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["suite", "--help"])
    assert stopped.value.code == 0
    assert "norm_multiple" in capsys.readouterr().out


def test_an_unknown_asset_names_the_near_miss(capsys):
    code, _, said = typed(capsys, "assets", "verify", "sot")
    assert code == 2
    assert "did you mean 'sotu'?" in said


PLUGIN = '''"""An evaluation of one's own."""
from dataclasses import dataclass
from evalkit.evaluations.base import EVALUATIONS, Evaluation, Metric, Result, Score

@dataclass(frozen=True)
class Settings:
    pass

@EVALUATIONS.register("{name}")
class Count(Evaluation):
    name = "{name}"
    version = 1
    config = Settings
    metrics = {{"width": Metric("width", "neither", note="features it has", main=True)}}

    def run(self, bench, dictionary, config):
        return Result([Score("width", float(dictionary.n_features))])
'''


def test_a_module_of_ones_own_is_imported_from_here(tmp_path, monkeypatch, capsys, done):
    suite, _ = done
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(EVALUATIONS, "_items", dict(EVALUATIONS._items))
    (tmp_path / "own_count.py").write_text(PLUGIN.format(name="own_count"))
    (tmp_path / "own_clash.py").write_text(PLUGIN.format(name="inputs"))
    (tmp_path / "own_broken.py").write_text("1 / 0")
    for name in ("own_count", "own_clash", "own_broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with_own = tmp_path / "own.toml"
    with_own.write_text(suite.read_text() + '\n[[evaluation]]\nname = "own_count"\n')
    code, _, said = typed(capsys, "suite", with_own)
    assert code == 2 and "no evaluation called 'own_count'" in said
    code, out, said = typed(capsys, "suite", with_own, "--plugin", "own_count")
    assert (code, said) == (0, "") and "3 evaluations" in out
    for name, told in (
        ("own_clash", "two evaluations are called 'inputs'"),
        ("own_broken", "ZeroDivisionError"),
        ("no_such", "No module"),
    ):
        code, _, said = typed(capsys, "suite", suite, "--plugin", name)
        assert code == 2 and told in said and "--plugin" in said and "internal" not in said


def test_options_that_a_command_lacks_name_the_near_miss(capsys):
    for words, meant in (
        (("report", "--feature", "3", "--featurs", "2"), "--features"),
        (("table", "x", "--Format=csv"), "--format"),
    ):
        code, said = refused(capsys, *words)
        assert code == 2 and f"did you mean '{meant}'?" in said and f"evalkit {words[0]}" in said
    code, said = refused(capsys, "export", "SAE", "(TopK)", "-o", "x")
    assert code == 2 and "quote what has blanks" in said
