"""Trains a robust triplet model: `ray job submit --working-dir . -- python jobs/harden_triplet.py
[options]`.
"""

import sys

from flowerray.cli import main

main(["train", "triplet", "--harden.kind", "pgd", *sys.argv[1:]])
