"""Writes a report: `ray job submit --working-dir . -- python jobs/report.py RUNS [options]`."""

import sys

from flowerray.cli import main

main(["report", *sys.argv[1:]])
