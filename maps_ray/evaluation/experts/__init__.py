"""Scripted experts that solve simulator tasks from privileged state, and the collection of their demonstrations."""

from maps_ray.evaluation.experts.pick_place import NoPlan, PickPlaceExpert

__all__ = ["NoPlan", "PickPlaceExpert"]
