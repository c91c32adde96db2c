"""Explores a data set: `ray job submit --working-dir . -- python jobs/explore.py DIR [options]`."""

import sys

from flowerray.cli import main

if __name__ == "__main__":
    main(["explore", *sys.argv[1:]])
