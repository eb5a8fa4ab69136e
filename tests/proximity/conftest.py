import sys
from pathlib import Path

# The exactness benchmark holds the network, the cases and the reference that these tests share with it.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
