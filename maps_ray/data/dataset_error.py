"""The error of everything that reads or writes demonstrations."""

from __future__ import annotations


class DatasetError(ValueError):
    """Demonstrations that cannot be read, written or used; the message names the file or field, and the remedy."""
