"""Sweeps over relaxation orders, shapes and strengths: many runs of one base, searched with Ray Tune and Optuna."""
