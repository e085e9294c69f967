"""Runs a program in another process, for what must not depend on the state of this one."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_python(program: str, **environment: str) -> str:
    """What the program prints, run in the project's folder with these environment variables. Raises CalledProcessError
    if it fails."""
    options = {"cwd": ROOT, "env": os.environ | environment, "capture_output": True, "text": True, "check": True}
    return subprocess.run([sys.executable, "-c", program], **options).stdout
