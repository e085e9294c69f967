"""Tokens per second and memory of one process, and of two that share its steps, of one CPU thread each.

    uv run benchmarks/processes.py --model_path tiny --dataset_name arithmetic
    uv run benchmarks/processes.py --model_path MODEL --dataset_name arithmetic --prompts_per_step 4 --max_steps 4

Flags are those of main.py. Each run starts from the same model under torchrun, so that all sample the same completions:
one process, two replicas, and two with divided training state. The first step is left out.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import table

ROOT = Path(__file__).resolve().parent.parent
SIDES = {"one process": (1, 1), "two replicas": (2, 1), "two, --fsdp_size 2": (2, 2)}  # processes, fsdp_size
STEPS = "--max_steps 6 --eval_steps 0 --eval_size 4 --log_completions_steps 0 --device cpu"


def measure(processes: int, fsdp_size: int, folder: Path, flags: list[str]) -> tuple[float, float]:
    """-> the median of tokens per second, and the largest memory of a process in GB."""
    sys.path.insert(0, str(ROOT))
    from run_folder import LOG, read_records

    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    more = ["--output_dir", str(folder), "--fsdp_size", str(fsdp_size)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launcher, "main.py", *STEPS.split(), *flags, *more], cwd=ROOT, env=environment, check=True)
    records = read_records(folder / LOG)[1:]
    speed = statistics.median(record["tokens_per_second"] for record in records)
    return speed, max(record["peak_memory_gb"] for record in records)


def main() -> None:
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, sizes) in enumerate(SIDES.items()):
            speed, memory = measure(*sizes, Path(scratch) / str(number), sys.argv[1:])
            first = float(rows[0][1]) if rows else speed
            rows.append([name, f"{speed:.1f}", f"{speed / first:.2f} ×", f"{memory:.2f}"])
    print(table(["", "tokens/s", "of one process", "GB a process"], rows))


if __name__ == "__main__":
    main()
