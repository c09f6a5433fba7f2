"""The results file: journals of runs, a DuckDB index of them, and how both are read."""
