"""What came out: live picture, reading of the curves, evaluation, card, comparison, sharing."""
