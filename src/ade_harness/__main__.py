"""``python -m ade_harness``."""

from __future__ import annotations

import sys
from pathlib import Path

# `python -m` puts the working directory first, where an untrusted submission may have a yaml.py; a model's own module
# is looked for there when it is asked for (models/formats/python.py)
if sys.path[:1] in ([""], [str(Path.cwd())]) and not Path("ade_harness").is_dir():
    del sys.path[0]

from ade_harness.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
