"""Rolls a policy out in simulators: the entry point for `ray job submit`.

    ray job submit --working-dir . -- python jobs/evaluate.py runs/tiny --suite libero_object --episodes 20

Takes the arguments of `maps-ray evaluate`; submitted again, it goes on where it was.
"""

import sys

from maps_ray.cli import main

if __name__ == "__main__":
    sys.argv[1:] = ["evaluate", *sys.argv[1:]]
    main()
