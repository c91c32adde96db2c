"""Explains a model: `ray job submit --working-dir . -- python jobs/explain.py RUN [options]`."""

import sys

from flowerray.cli import main

if __name__ == "__main__":
    main(["explain", *sys.argv[1:]])
