"""Tunes siamese: `ray job submit --working-dir . -- python jobs/tune_siamese.py [options]`."""

import sys

from flowerray.cli import main

if __name__ == "__main__":
    main(["tune", "siamese", *sys.argv[1:]])
