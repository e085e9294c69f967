"""Time and peak memory of log-probabilities with gradients: in tiles (as in training) or all at once.

    uv run benchmarks/logps.py

Hidden states (B·T, H) and an output embedding (V, H) with V = 151,936 as in Qwen2.5; forward and backward pass. The two
sides take turns, each in its own process, so that peak memory is measured separately.
"""

from __future__ import annotations

import argparse
import statistics
from multiprocessing.connection import Connection

from common import Worker, median_of_ratios, serve, table, timed


def side(
    connection: Connection,
    tiled: bool,
    rows: int,
    length: int,
    hidden: int,
    vocabulary: int,
    device: str,
    dtype: str,
) -> None:
    """A worker that computes the log-probabilities of rows × length random tokens."""
    import torch

    from logprobs import BlockedLogps
    from run import peak_memory_gb

    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    states = torch.randn(rows * length, hidden, device=device, dtype=kind, requires_grad=True)  # (N, H)
    weight = torch.randn(vocabulary, hidden, device=device, dtype=kind).mul_(hidden**-0.5).requires_grad_()  # (V, H)
    targets = torch.randint(vocabulary, (rows * length,), device=device)  # (N,)

    def step() -> None:
        if tiled:
            logps = BlockedLogps.apply(states, weight, targets, 1.0, None)[0]  # (N,)
        else:
            logits = (states @ weight.T).float()  # (N, V)
            logps = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]  # (N,)
        logps.sum().backward()
        states.grad = weight.grad = None

    def peak() -> float:
        return peak_memory_gb(states.device)

    base = peak()
    serve(connection, lambda count: [timed(step, device) for _ in range(count)], lambda: peak() - base)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8, help="B: completions")
    parser.add_argument("--length", type=int, default=512, help="T: tokens of each completion")
    parser.add_argument("--hidden", type=int, default=256, help="H: 1536 for Qwen2.5-1.5B; the default suits a laptop")
    parser.add_argument("--vocabulary", type=int, default=151_936, help="V: tokens in the vocabulary")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each side, in turns")
    args = parser.parse_args()
    shape = (args.rows, args.length, args.hidden, args.vocabulary, args.device, args.dtype)
    workers = {"all logits at once": Worker(side, False, *shape), "in tiles": Worker(side, True, *shape)}
    times: dict[str, list[float]] = {name: [] for name in workers}
    for worker in workers.values():
        worker.ready()
        worker.steps(1)
    for _ in range(args.rounds):
        for name, worker in workers.items():
            times[name] += worker.steps(1)
    peaks = {name: worker.end() for name, worker in workers.items()}
    rows = [[name, f"{statistics.median(times[name]):.2f}", f"{peaks[name]:.2f}"] for name in workers]
    naive, tiled = workers
    model = f"hidden {args.hidden}, vocabulary {args.vocabulary:,}, {args.dtype}, {args.device}"
    print(f"{args.rows} × {args.length} tokens, {model}")
    print(table(["", "seconds", "additional memory, GB"], rows))
    ratio = median_of_ratios(times[tiled], times[naive])
    print(f"in tiles: {ratio:.2f} × the time, 1/{peaks[naive] / peaks[tiled]:.1f} of the memory")


if __name__ == "__main__":
    main()
