"""Explores a data set: `ray job submit --working-dir . -- python jobs/explore.py DIR [options]`."""

import sys

from flowerray.cli import main

main(["explore", *sys.argv[1:]])
