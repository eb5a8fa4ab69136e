"""The worker loop, the engine, checkpoints and resume."""
