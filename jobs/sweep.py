"""Runs one sweep: the entry point for `ray job submit`. Submitted again under the same name, it goes on where it was.

    ray job submit --working-dir . -- python jobs/sweep.py jobs/sweep_orders.yaml

Takes the arguments of `maps-ray sweep`.
"""

import sys

from maps_ray.cli import main

if __name__ == "__main__":
    sys.argv[1:] = ["sweep", *sys.argv[1:], "--continue"]
    main()
