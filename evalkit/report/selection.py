"""Single features: their names, and the rows of a table that are about one.

If several configurations have a feature, the first one in the suite is used; rows of two configurations are never pooled.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

SAME = ["dictionary", "hook_point", "feature"]
"""Columns that name a feature."""
Name = tuple[str, str, int]
"""Dictionary, hook point and feature."""


def first_of(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each feature, the rows of the first configuration that has it."""
    return rows[rows["config"] == rows.groupby(SAME, sort=False)["config"].transform("first")]


def of_feature(rows: pd.DataFrame, about: pd.Series) -> pd.DataFrame:
    """Rows about one feature, of the first configuration that has it.

    Args:
        about: dictionary, hook_point and feature.
    """
    return first_of(rows[(rows[SAME] == about[SAME]).all(axis=1)])


def by_feature(rows: pd.DataFrame) -> dict[Name, pd.DataFrame]:
    """Rows of each feature, of the first configuration that has it; rows without a feature are left out."""
    groups: Any = first_of(rows[rows["feature"].notna()]).groupby(SAME, sort=False)
    return {(str(dictionary), str(hook_point), int(feature)): part for (dictionary, hook_point, feature), part in groups}


def name_of(row: Any) -> Name:
    """The name of the feature that a row is about."""
    return (str(row["dictionary"]), str(row["hook_point"]), int(row["feature"]))
