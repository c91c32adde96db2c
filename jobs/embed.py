"""Embeds many: `ray job submit --working-dir . -- python jobs/embed.py RUN SOURCE --out DIR`."""

import sys

from flowerray.cli import main

if __name__ == "__main__":
    main(["embed", *sys.argv[1:]])
