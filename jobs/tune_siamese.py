"""Tunes the siamese method: `ray job submit --working-dir . -- python jobs/tune_siamese.py
[options]`.
"""

import sys

from flowerray.cli import main

main(["tune", "siamese", *sys.argv[1:]])
