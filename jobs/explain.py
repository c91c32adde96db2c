"""Explains a trained model: `ray job submit --working-dir . -- python jobs/explain.py RUN
[options]`.
"""

import sys

from flowerray.cli import main

main(["explain", *sys.argv[1:]])
