"""Tunes center: `ray job submit --working-dir . -- python jobs/tune_center.py [options]`."""

import sys

from flowerray.cli import main

if __name__ == "__main__":
    main(["tune", "center", *sys.argv[1:]])
