"""Trains one run spec: the entry point for `ray job submit`.

    ray job submit --working-dir . -- python jobs/train.py jobs/tiny.yaml --set training.max_steps=100

Takes the arguments of `maps-ray train`.
"""

import sys

from maps_ray.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
