"""Trains one run spec: the entry point for `ray job submit`. Submitted again, the run goes on where it was.

    ray job submit --working-dir . -- python jobs/train.py jobs/tiny.yaml --set training.max_steps=100

Takes the arguments of `maps-ray train`.
"""

import sys

from maps_ray.cli import main

if __name__ == "__main__":
    sys.argv[1:] = ["train", *sys.argv[1:], "--continue"]
    main()
