"""Imports DeepSpeed without MLflow, before anything else in this package imports it.

DeepSpeed 0.19's autotuner, which no run uses but every `import deepspeed` loads, imports MLflow where it is installed:
a quarter of the time that a worker takes to start, and 70 MiB of its memory. It goes without where that import fails.
"""

from __future__ import annotations

import sys

if "mlflow" not in sys.modules:
    # None makes `import mlflow` fail.
    sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        import deepspeed  # noqa: F401
    finally:
        del sys.modules["mlflow"]
