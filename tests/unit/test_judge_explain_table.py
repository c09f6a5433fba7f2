"""The published explainer's table: quantisation by its formula, the repeat without zeros, one line a token."""

import pytest
from judge_fakes import completions, endpoint

from evalkit.errors import JudgeSetupError
from evalkit.judges.backends.openai import openai_judge
from evalkit.judges.base import Example, ExplainTask
from evalkit.judges.config import JudgeConfig
from evalkit.judges.prompts.explain_table import PRIMED, explain_text, quantised
from evalkit.util.progress import Progress

TASK = ExplainTask([Example([" a", "b\n", "c"], [0.0, 0.99, -3.0]), Example(["d", "e", "f"], [10.0, 5.0, 0.0])])


def test_quantisation_is_the_published_formula():
    assert quantised(Example(list("abcde"), [-1.0, 0.99, 1.0, 9.99, 10.0]), 10.0) == [0, 0, 1, 9, 10]
    assert quantised(Example(["a"], [-1.0]), 0.0) == [0]


def test_the_table_holds_every_token_on_its_line_and_ends_primed():
    text = explain_text(TASK)
    shown = text.split("Activations:\n")[-1]
    assert "<start>\n a\t0\nb\\n\t0\nc\t0\n<end>\n<start>\nd\t10\ne\t5\nf\t0\n<end>\n" in shown
    assert text.endswith(PRIMED)
    assert "zeros left out" not in shown


def test_sparse_records_are_repeated_without_zeros():
    sparse = ExplainTask([Example([str(n) for n in range(10)], [0.0] * 9 + [4.0])])
    shown = explain_text(sparse).split("Activations:\n")[-1]
    assert "The same, zeros left out:\n<start>\n9\t10\n<end>\n" in shown


@pytest.mark.parametrize(
    ("form", "in_it", "not_in_it"), [("table", PRIMED, "Active tokens:"), ("peaks", "Active tokens:", PRIMED)]
)
def test_the_suite_chooses_the_form_and_it_is_part_of_the_identity(tmp_path, monkeypatch, form, in_it, not_in_it):
    monkeypatch.setenv("EVALKIT_TEST_KEY", "k")
    with endpoint(completions) as fake:
        config = JudgeConfig(
            provider="openai", model="m", base_url=fake.url, api_key_env="EVALKIT_TEST_KEY", simulation="slots", explain_from=form
        )
        with openai_judge(config, tmp_path, Progress(quiet=True)) as judge:
            assert judge.explain([TASK])[0].status == "ok"
            assert judge.identity["explain_from"] == form
        prompt = str(fake.bodies[-1]["prompt"])
    assert in_it in prompt
    assert not_in_it not in prompt


def test_a_mistyped_form_names_the_near_miss():
    with pytest.raises(JudgeSetupError) as caught:
        JudgeConfig(provider="openai", model="m", explain_from="tabel")
    assert "did you mean 'table'?" in caught.value.fix
