"""Trains a robust siamese model: `ray job submit --working-dir . -- python jobs/harden_siamese.py
[options]`.
"""

import sys

from flowerray.cli import main

main(["train", "siamese", "--harden.kind", "pgd", *sys.argv[1:]])
