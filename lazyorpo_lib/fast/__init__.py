"""The same numbers, sooner; tested against orpo/scoring.py on the model itself."""
