"""Trains siamese: `ray job submit --working-dir . -- python jobs/train_siamese.py [options]`."""

import sys

from flowerray.cli import main

if __name__ == "__main__":
    main(["train", "siamese", *sys.argv[1:]])
