"""Demonstrations -> normalised, tokenised batches."""
