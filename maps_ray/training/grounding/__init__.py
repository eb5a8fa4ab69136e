"""Pretraining on grounded language: questions about rendered scenes, answered by parallel decoding."""
