"""Writes a report: `ray job submit --working-dir . -- python jobs/report.py RUNS [options]`."""

import sys

from flowerray.cli import main

if __name__ == "__main__":
    main(["report", *sys.argv[1:]])
