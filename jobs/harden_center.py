"""Trains a robust center model: `ray job submit --working-dir . -- python jobs/harden_center.py
[options]`.
"""

import sys

from flowerray.cli import main

main(["train", "center", "--harden.kind", "pgd", *sys.argv[1:]])
