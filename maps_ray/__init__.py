"""Anchored fine-tuning of vision-language-action models with MAPS, on Ray, DeepSpeed ZeRO and MLflow."""

__version__ = "0.1.0"
