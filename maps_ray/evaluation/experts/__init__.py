"""Scripted experts that solve simulator tasks from privileged state, and the collection of their demonstrations."""

from maps_ray.evaluation.experts.motions import NoPlan

__all__ = ["NoPlan"]
