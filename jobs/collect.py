"""Collects demonstrations of the scripted experts: the entry point for `ray job submit`.

    python jobs/collect.py --suite libero_object --episodes 8 --out demos

Takes the arguments of `maps-ray collect`; submitted again, it goes on where it was.
"""

import sys

from maps_ray.cli import main

if __name__ == "__main__":
    sys.argv[1:] = ["collect", *sys.argv[1:]]
    main()
