"""Runs of main.py by several processes, as torchrun would start them, without importing torch once for each.

    python tests/parallel_worlds.py PLAN.json

PLAN.json is a list of worlds, {"size": 2, "runs": [{"argv": […], "fault": …, "layers": …}]}. The processes of a world
are forked after the imports; each does all runs of its world one after the other, in float64, until one fails. Prints a
JSON list with an entry for each world: the exit statuses of every process, run by run, and the seconds it took.

"layers": "transformers" leaves out layers.py, as on a GPU. A fault is {"kind": …, "rank": …, "step": …}: "error" raises
after that step, "signal" sends SIGTERM to that process alone, "nan" makes the gradients of its part of the loss NaN.
"""

import dataclasses
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import logprobs
import main
import optimizer
import rollout
import run
from config import parse_args

SECONDS = 120  # for a world; then its processes end, also where they wait for each other or have lost their parent


class WideSampler(rollout.SharedSampler):
    """The loss keeps log-probabilities in the dtype in which the sampler gives them: float64 here."""

    def sample(self, *args, **options) -> rollout.Rollout:
        found = super().sample(*args, **options)
        found.sampler_logps = found.sampler_logps.double()
        return found


def work(rank: int, size: int, port: int, runs: list[dict], statuses) -> None:
    signal.alarm(SECONDS)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    rollout.SharedSampler = WideSampler
    fast = logprobs.uses_fast_layers
    for number, one in enumerate(runs):
        logprobs.uses_fast_layers = (lambda model: False) if one.get("layers") == "transformers" else fast
        with_fault(one.get("fault"), rank)
        config = dataclasses.replace(parse_args(one["argv"]), dtype="float64")
        status = run.exit_status(main.set_up_and_train, config)
        statuses[rank * len(runs) + number] = status
        if status == 2:
            break
    sys.stderr.flush()
    os._exit(0)


def with_fault(fault: dict | None, rank: int) -> None:
    """Put a fault into this process, or take it out again."""
    log_step, add = run.Run.log_step, optimizer.parallel.add_gradients
    run.Run.log_step = getattr(log_step, "original", log_step)
    optimizer.parallel.add_gradients = getattr(add, "original", add)
    if fault is None or fault["rank"] != rank:
        return
    log_step, add = run.Run.log_step, optimizer.parallel.add_gradients

    def faulty_log_step(self, record: dict) -> None:
        log_step(self, record)
        if record["step"] == fault["step"] and fault["kind"] == "error":
            raise OSError("this reward server does not answer")
        if record["step"] == fault["step"] and fault["kind"] == "signal":
            os.kill(os.getpid(), signal.SIGTERM)

    calls = []

    def faulty_add(parameters: list) -> None:
        calls.append(1)
        if len(calls) == fault["step"] and fault["kind"] == "nan":
            torch._foreach_mul_([one.grad for one in parameters if one.grad is not None], float("nan"))
        add(parameters)

    faulty_log_step.original, faulty_add.original = log_step, add
    run.Run.log_step, optimizer.parallel.add_gradients = faulty_log_step, faulty_add


def world(size: int, runs: list[dict]) -> dict:
    """Start the processes of a world and wait for them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start, fork = time.perf_counter(), multiprocessing.get_context("fork")
    statuses = fork.Array("i", [-1] * (size * len(runs)), lock=False)  # -1: the run did not end
    processes = [fork.Process(target=work, args=(rank, size, port, runs, statuses)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    found = {f"{rank}": statuses[rank * len(runs) : (rank + 1) * len(runs)] for rank in range(size)}
    return {"statuses": found, "seconds": time.perf_counter() - start}


if __name__ == "__main__":
    torch.set_num_threads(1)  # forked processes could not use the threads of this one
    print(json.dumps([world(**one) for one in json.loads(Path(sys.argv[1]).read_text())]))
