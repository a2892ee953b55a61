"""Several runs: recipes, probe."""
