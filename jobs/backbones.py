"""Measures backbones: `ray job submit --working-dir . -- python jobs/backbones.py [options]`."""

import sys

from flowerray.cli import main

if __name__ == "__main__":
    main(["backbones", *sys.argv[1:]])
