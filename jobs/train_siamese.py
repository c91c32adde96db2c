"""Trains the siamese method: `ray job submit --working-dir . -- python jobs/train_siamese.py
[options]`.
"""

import sys

from flowerray.cli import main

main(["train", "siamese", *sys.argv[1:]])
