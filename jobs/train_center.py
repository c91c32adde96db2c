"""Trains the center method: `ray job submit --working-dir . -- python jobs/train_center.py
[options]`.
"""

import sys

from flowerray.cli import main

main(["train", "center", *sys.argv[1:]])
