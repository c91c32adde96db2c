"""Compares: `ray job submit --working-dir . -- python jobs/compare_methods.py [options]`."""

import sys

from flowerray.cli import main

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]])
