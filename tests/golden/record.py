"""Write the expected rows of the golden suite again: ``python tests/golden/record.py``.

Rows that agree with those of before stay byte for byte, so that the difference in version control is what changed.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]


def main() -> None:
    """Run the suite and write every table."""
    from golden_case import run_suites
    from golden_tables import EXPECTED, read_tables, recorded, save

    with tempfile.TemporaryDirectory() as folder:
        tables = read_tables(run_suites(Path(folder)))
    EXPECTED.mkdir(exist_ok=True)
    for name in set(recorded()) - set(tables):
        (EXPECTED / f"{name}.jsonl").unlink()
    for name, table in tables.items():
        print(f"{name}: {len(table.rows)} rows, {save(name, table)} changed")


if __name__ == "__main__":
    main()
