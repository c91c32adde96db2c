"""Tunes the triplet method: `ray job submit --working-dir . -- python jobs/tune_triplet.py
[options]`.
"""

import sys

from flowerray.cli import main

main(["tune", "triplet", *sys.argv[1:]])
