"""Make docs/terminal.png: the demo's real output, as a terminal shows it. Needs Chromium.

python scripts/terminal_picture.py
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from rich.console import Console

from ade_harness.config.compose import compose_config
from ade_harness.config.composed import Composed
from ade_harness.evaluation.session import run_session

PICTURE = Path(__file__).parents[1] / "docs" / "terminal.png"
WIDTH = 1200
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--hide-scrollbars")  # fmt: skip


def main() -> None:
    """Run the demo with a recording console, and draw the record."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        with Path(os.devnull).open("w") as nowhere:
            console = Console(record=True, force_terminal=False, width=136, file=nowhere)
            console.print("[bold green]$[/] python -m ade_harness")
            run_session(Composed.from_config(compose_config([])), console=console)
        page = Path(folder) / "page.html"
        svg = console.export_svg(title="ade-harness")
        drawn = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
        assert drawn is not None
        height = math.ceil(WIDTH * float(drawn[2]) / float(drawn[1]))
        page.write_text(f"<body style='margin:0'><style>svg {{width: {WIDTH}px}}</style>{svg}</body>")
        browser = shutil.which("chromium") or shutil.which("google-chrome")
        if browser is None:
            raise SystemExit("install chromium to make the picture")
        command = [browser, *FLAGS, f"--user-data-dir={folder}/profile", f"--window-size={WIDTH},{height}",
                   f"--screenshot={PICTURE}", page.as_uri()]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)


if __name__ == "__main__":
    main()
