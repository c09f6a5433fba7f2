"""Run, plan or train a suite; find its features; look at an import."""
