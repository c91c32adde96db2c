"""Trains triplet: `ray job submit --working-dir . -- python jobs/train_triplet.py [options]`."""

import sys

from flowerray.cli import main

if __name__ == "__main__":
    main(["train", "triplet", *sys.argv[1:]])
