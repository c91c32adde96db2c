"""Hardens triplet: `ray job submit --working-dir . -- python jobs/harden_triplet.py [options]`."""

import sys

from flowerray.cli import main

kind = [] if "--resume" in " ".join(sys.argv) else ["--harden.kind", "pgd"]  # a RUN has its own
if __name__ == "__main__":
    main(["train", "triplet", *kind, *sys.argv[1:]])
