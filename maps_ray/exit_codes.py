"""Exit codes of the commands that have a meaning of their own."""

STOPPED = 130
"""Ctrl-C ended it, as shells have it; what was begun can be continued."""
