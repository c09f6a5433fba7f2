"""Settings of trainings: shared ones, recipes, sweeps."""
