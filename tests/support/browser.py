"""Opens a page in headless Chromium, where it is installed, and gives back what it has become."""

import shutil
import subprocess
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update"
)


def dom_of(
    url: str, profile: Path, *, width: int = 1280, height: int = 2000, virtual_ms: int = 60_000
) -> str:
    """The page's elements after `virtual_ms` of its own time."""
    command = [
        str(CHROMIUM),
        *_FLAGS.split(),
        f"--user-data-dir={profile}",
        f"--virtual-time-budget={virtual_ms}",
        f"--window-size={width},{height}",
        "--dump-dom",
        url,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=250, check=True).stdout
