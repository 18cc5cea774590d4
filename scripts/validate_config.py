"""The same as `difftrain validate`, for a checkout that is not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainer.cli import main

if __name__ == "__main__":
    sys.exit(main(["validate", *sys.argv[1:]]))
