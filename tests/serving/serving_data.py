"""What the small policy of the serving tests is."""

from __future__ import annotations

from typing import Any

TOKEN = "a token of the test"
SIZES: dict[str, Any] = {"num_images": 2, "use_proprio": True, "chunk": 4}
RANGE = {"q01": [-1.0] * 8, "q99": [1.0] * 8, "min": [-2.0] * 8, "max": [2.0] * 8}
STATISTICS = {"demos": {"action": {name: values[:7] for name, values in RANGE.items()}, "proprio": RANGE}}
