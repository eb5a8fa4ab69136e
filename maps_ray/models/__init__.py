"""One folder per VLA; each names its modules in stack order and reads upstream checkpoints."""
