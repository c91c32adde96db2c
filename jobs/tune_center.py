"""Tunes the center method: `ray job submit --working-dir . -- python jobs/tune_center.py
[options]`.
"""

import sys

from flowerray.cli import main

main(["tune", "center", *sys.argv[1:]])
