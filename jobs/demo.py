"""What `make demo` runs: the tiny VLA with MAPS and without, compared in a table and in report.html.

python jobs/demo.py
"""

import sys
from pathlib import Path

from maps_ray.cli import main

if __name__ == "__main__":
    sys.argv[1:] = ["compare", str(Path(__file__).parent / "tiny.yaml"), "--against", "proximity.lambda_max=0"]
    main()
