"""Time and peak memory of log-probabilities with gradients: in chunks (as trained here) against all logits at once.

    uv run benchmarks/logps.py

Hidden states (B·T, H) and an output embedding (V, H) with V = 151,936 as in Qwen2.5; forward and backward pass. Each
side runs in a process of its own, so that peak memory is its own; both take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time

from common import Worker, peak_gb, synchronize, table


def side(
    connection, chunked: bool, rows: int, length: int, hidden: int, vocabulary: int, device: str, dtype: str
) -> None:
    import torch

    from llms import ChunkedLogps

    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    states = torch.randn(rows * length, hidden, device=device, dtype=kind, requires_grad=True)  # (N, H)
    weight = (torch.randn(vocabulary, hidden, device=device) * hidden**-0.5).to(kind).requires_grad_()  # (V, H)
    targets = torch.randint(vocabulary, (rows * length,), device=device)  # (N,)

    def naive():
        logits = (states @ weight.T).float()  # (N, V)
        return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    def step():
        logps = ChunkedLogps.apply(states, weight, targets, 1.0, None)[0] if chunked else naive()  # (N,)
        logps.sum().backward()
        states.grad = weight.grad = None

    base = peak_gb(device)
    connection.send("ready")
    while (count := connection.recv()) is not None:
        times = []
        for _ in range(count):
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            times.append(time.perf_counter() - start)
        connection.send(times)
    connection.send(peak_gb(device) - base)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=256, help="1536 for Qwen2.5-1.5B; less fits a laptop's patience")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    shape = (args.rows, args.length, args.hidden, args.vocabulary, args.device, args.dtype)
    workers = {"all logits at once": Worker(side, False, *shape), "in chunks": Worker(side, True, *shape)}
    times: dict[str, list[float]] = {name: [] for name in workers}
    for worker in workers.values():
        worker.ready()
        worker.steps(1)
    for _ in range(args.rounds):
        for name, worker in workers.items():
            times[name] += worker.steps(1)
    peaks = {name: worker.end() for name, worker in workers.items()}
    rows = [[name, f"{statistics.median(times[name]):.2f}", f"{peaks[name]:.2f}"] for name in workers]
    naive, chunked = workers
    slower = statistics.median(c / n for c, n in zip(times[chunked], times[naive], strict=True))
    model = f"hidden {args.hidden}, vocabulary {args.vocabulary:,}, {args.dtype}, {args.device}"
    print(f"{args.rows} × {args.length} tokens, {model}")
    print(table(["", "s", "memory on top, GB"], rows))
    print(f"in chunks: {slower:.2f} × the time, 1/{peaks[naive] / peaks[chunked]:.1f} of the memory")


if __name__ == "__main__":
    main()
