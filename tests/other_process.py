"""Runs a program in another process, for what must not depend on the state of this one."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_python(program: str) -> str:
    """What the program prints, run in the project's folder. Raises CalledProcessError if it fails."""
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout
