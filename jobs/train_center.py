"""Trains center: `ray job submit --working-dir . -- python jobs/train_center.py [options]`."""

import sys

from flowerray.cli import main

if __name__ == "__main__":
    main(["train", "center", *sys.argv[1:]])
