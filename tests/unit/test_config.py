"""Settings classes: what a table may hold, what messages say, and that no value is changed on the way."""

from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import pytest

from evalkit.errors import SuiteError
from evalkit.util.hashing import canonical
from evalkit.util.settings import Count, Mistakes, NotNegative, Range, Settings, Share, help_text, parse


@dataclass(frozen=True)
class Sample(Settings):
    """A sample."""

    features: Count
    """Features drawn."""
    level: Share = 0.5
    """Share of the maximum."""
    alpha: Annotated[float, Range(gt=0, lt=1)] = 0.05
    """Level of a test."""
    around: NotNegative | None = None
    """Tokens on either side."""
    of: Literal["all", "alive"] = "all"
    """Which features."""
    texts: str | tuple[str, ...] = ()
    """Texts, or where they are."""
    weights: tuple[Annotated[float, Range(gt=0)], ...] = ()
    """One for each text."""

    def check_together(self) -> None:
        if self.around is not None and self.around > self.features:
            raise ValueError("around is more than features")


@dataclass(frozen=True)
class Plain:
    """Settings of another package, which know nothing of evalkit."""

    name: str
    bins: int = 3
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.bins == 7:
            raise ValueError("seven bins are unlucky")


@pytest.mark.parametrize(
    ("table", "what", "where", "fix"),
    [
        ({"features": 0}, "features = 0 is too small", "[sample] features", "choose 1 or more"),
        ({"features": True}, "True is not a whole number", "[sample] features", "write a whole number"),
        ({"features": 2.0}, "2.0 is not a whole number", "[sample] features", "write a whole number"),
        ({"features": "2"}, "'2' is not a whole number", "[sample] features", "write a whole number"),
        ({"features": 1, "level": 1.5}, "level = 1.5, but level is from 0 to 1", "[sample] level", "choose a number from 0 to 1"),
        ({"features": 1, "level": float("nan")}, "nan is not a number", "[sample] level", "write a number"),
        ({"features": 1, "alpha": 1}, "alpha = 1, but alpha is between 0 and 1", "[sample] alpha", "choose a number between"),
        ({"features": 1, "around": -1}, "around = -1 cannot be negative", "[sample] around", "choose 0 or more"),
        ({"features": 1, "around": 2}, "around is more than features", "[sample]", "correct the value"),
        ({"features": 1, "of": "alife"}, "'alife' is not one of 'all', 'alive'", "[sample] of", "did you mean 'alive'?"),
        ({"features": 1, "texts": 3}, "3 is not a string or a list of a string", "[sample] texts", "write a string or"),
        ({"features": 1, "texts": ["a", 3]}, "['a', 3] is not a string or a list of a string", "[sample] texts", "write a"),
        ({"features": 1, "weights": [0.0]}, "weights = 0.0 is too small", "[sample] weights", "choose a number above 0"),
        ({"feature": 1, "features": 1}, "unknown key 'feature'", "[sample]", "did you mean 'features'?"),
        ({}, "the key 'features' is missing", "[sample]", "add features = ...: Features drawn."),
    ],
)  # fmt: skip
def test_a_wrong_value_names_what_where_and_what_to_do(table, what, where, fix):
    with pytest.raises(SuiteError) as caught:
        parse(Sample, table, "[sample]")
    assert (caught.value.what, caught.value.where) == (what, where)
    assert caught.value.fix.startswith(fix)


def test_every_mistake_of_a_table_has_its_line():
    with pytest.raises(Mistakes) as caught:
        parse(Sample, {"features": 0, "level": 2, "lvel": 1}, "[sample]")
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 mistakes"
    assert [line.split(":")[0].strip() for line in lines[1:4]] == ["[sample] features", "[sample] level", "[sample]"]
    assert "did you mean 'level'?" in lines[3]


def test_python_code_is_held_to_the_same_ranges():
    with pytest.raises(ValueError, match="features = 0") as caught:
        Sample(0)
    assert isinstance(caught.value, SuiteError)
    with pytest.raises(ValueError, match="around is more"):
        Sample(1, around=2)


def test_values_are_kept_as_they_are_written():
    built = parse(Sample, {"features": 3, "level": 1, "texts": ["a", "b"], "weights": [1, 2.5]}, "[sample]")
    # these bytes are part of the keys of finished runs
    assert canonical(asdict(built)) == (
        '{"alpha":0.05,"around":null,"features":3,"level":1.0,"of":"all","texts":["a","b"],"weights":[1.0,2.5]}'
    )
    assert built.texts == ("a", "b")
    assert type(built.level) is float
    assert Sample(3, level=1).level == 1 and type(Sample(3, level=1).level) is int


def test_settings_of_another_package_need_no_base_class():
    built = parse(Plain, {"name": "mine", "weights": [1]}, "[plain]")
    assert type(built) is Plain and built == Plain("mine", weights=(1.0,))
    with pytest.raises(SuiteError, match="'many' is not a whole number"):
        parse(Plain, {"name": "mine", "bins": "many"}, "[plain]")
    with pytest.raises(SuiteError, match="seven bins"):
        parse(Plain, {"name": "mine", "bins": 7}, "[plain]")


def test_halves_of_characters_in_a_path_are_no_mistake():
    assert Sample(1, texts="folder\udcff").texts == "folder\udcff"


def test_help_says_the_range():
    text = help_text(Sample, "[sample]")
    assert "  features  (a whole number, 1 or more, required)\n      Features drawn." in text
    assert "  alpha  (a number, between 0 and 1, default 0.05)" in text
    assert "  around  (a whole number, 0 or more, optional)" in text


def test_a_key_that_was_removed_says_what_became_of_it():
    from evalkit.training.settings.session import SessionConfig

    with pytest.raises(SuiteError, match="the key 'stack' was removed") as caught:
        parse(SessionConfig, {"stack": "auto"}, "[training]")
    assert "take it out" in caught.value.fix
