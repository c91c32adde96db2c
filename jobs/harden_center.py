"""Hardens center: `ray job submit --working-dir . -- python jobs/harden_center.py [options]`."""

import sys

from flowerray.cli import main

own = {"--resume", "--from"} & {word.split("=")[0] for word in sys.argv}  # a RUN has its own kind
if __name__ == "__main__":
    main(["train", "center", *([] if own else ["--harden.kind", "pgd"]), *sys.argv[1:]])
