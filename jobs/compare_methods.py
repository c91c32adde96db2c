"""Compares the methods: `ray job submit --working-dir . -- python jobs/compare_methods.py
[options]`.
"""

import sys

from flowerray.cli import main

main(["compare", *sys.argv[1:]])
