"""``python -m ade_harness``."""

from __future__ import annotations

import sys

from ade_harness.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
