"""Print a command of the README, so that CI and tests run the very text that a newcomer copies.

python scripts/readme_commands.py demo|tests
"""

from __future__ import annotations

import re
import sys
from pathlib import Path


def readme_command(name: str) -> str:
    """Return the shell block that follows the marker ``<!-- command: NAME -->``."""
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- command: {re.escape(name)} -->\s*```bash\n(.*?)```", text, re.DOTALL)
    if found is None:
        raise SystemExit(f"README.md has no command {name!r}")
    return found[1].strip()


if __name__ == "__main__":
    print(readme_command(sys.argv[1]))
