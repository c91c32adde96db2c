"""Trains the triplet method: `ray job submit --working-dir . -- python jobs/train_triplet.py
[options]`.
"""

import sys

from flowerray.cli import main

main(["train", "triplet", *sys.argv[1:]])
