"""What `make demo` runs: the tiny VLA with MAPS and without, compared in a table and in report.html.

    python jobs/demo.py
"""

from pathlib import Path

from maps_ray.evaluation.compare import compare

if __name__ == "__main__":
    compare(
        Path(__file__).parent / "tiny.yaml",
        overrides=[],
        variants={"full fine-tuning": ["proximity.lambda_max=0"]},
    )
