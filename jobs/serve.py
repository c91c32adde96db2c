"""Serves an index: `ray job submit --working-dir . -- python jobs/serve.py INDEX [options]`."""

import sys

from flowerray.cli import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])
