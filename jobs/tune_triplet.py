"""Tunes triplet: `ray job submit --working-dir . -- python jobs/tune_triplet.py [options]`."""

import sys

from flowerray.cli import main

if __name__ == "__main__":
    main(["tune", "triplet", *sys.argv[1:]])
