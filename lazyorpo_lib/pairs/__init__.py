"""Pairs from what people have: one answer a prompt, thumbs, scores, clicks."""
