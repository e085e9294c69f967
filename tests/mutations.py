"""Would the tests notice? Puts one plausible bug at a time into a copy of the code and runs the tests on it.

    python tests/mutations.py                     all of them: prints the table of docs/mutations.md
    python tests/mutations.py "kl sign" ...       those whose name contains one of the words

Each bug is a replacement of text that must occur exactly once: code that has moved on makes this script stop rather
than report a bug as caught that was never put in. Without any bug the tests have to pass first.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("tests/test_objectives.py", "tests/test_contracts.py")
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "runs", "plots", "docs", "benchmarks", "*.lock")
TIMEOUT = 600  # seconds; a test that hangs has noticed, but nobody would know what


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    old: str
    new: str


MUTATIONS = [
    Mutation(
        "advantage sign",
        "main.py",
        "centred = groups - groups.mean(1, keepdim=True)",
        "centred = groups.mean(1, keepdim=True) - groups",
    ),
    Mutation("std over the wrong axis", "main.py", "groups.std(1, keepdim=True)", "groups.std(0, keepdim=True)"),
    Mutation(
        "end of sequence masked out",
        "rollout.py",
        "< lengths.clone()[:, None]  # (B, T)",
        "< (lengths - finished.long()).clone()[:, None]",
    ),
    Mutation("off by one in the shift", "llms.py", "index, ids[:, :-1], mask", "index, ids[:, 1:], mask"),
    Mutation(
        "off by one in the shift, prompts not shared",
        "llms.py",
        "return hidden[:, length - 1 : -1]",
        "return hidden[:, length:]",
    ),
    Mutation(
        "temperature forgotten by the trainer",
        "llms.py",
        "    if temperature != 1:\n        logits.div_(temperature)\n",
        "",
    ),
    Mutation(
        "temperature forgotten by the sampler",
        "rollout.py",
        "        if self.temperature not in (0, 1):\n            logits /= self.temperature\n",
        "",
    ),
    Mutation(
        "mean of the micro-batches' means",
        "main.py",
        "            normalizer=normalizer,\n",
        "            normalizer=len(plan)\n"
        "            * step_normalizer(objective.normalizer, mask[rows], args.max_completion_length),\n",
    ),
    Mutation(
        "ratio without detach",
        "main.py",
        "old = all_logps[rows] if old_logps is None else",
        "old = logps if old_logps is None else",
    ),
    Mutation(
        "old log-probabilities renewed at every update",
        "main.py",
        "old_logps = logps if old_logps is None else old_logps",
        "old_logps = logps",
    ),
    Mutation("KL sign: policy and reference exchanged", "main.py", "= ref_logps - logps", "= logps - ref_logps"),
    Mutation("KL sign: a reward for leaving", "main.py", "per_token + beta * kl", "per_token - beta * kl"),
    Mutation(
        "mask ignored in a normalizer: tokens",
        "main.py",
        "float(max(1, int(mask.sum())))",
        "float(mask.numel())",
    ),
    Mutation(
        "mask ignored in a normalizer: lengths",
        "main.py",
        "lengths = mask.sum(1, keepdim=True).clamp(min=1)",
        "lengths = mask.new_full((len(mask), 1), mask.shape[1])",
    ),
    Mutation(
        "rows permuted: answers in another order than completions",
        "main.py",
        "[example.answer for example in new_examples for _ in range(G)]",
        "[example.answer for _ in range(G) for example in new_examples]",
    ),
    Mutation(
        "rows permuted: advantages of a micro-batch",
        "main.py",
        "            advantages[rows],\n",
        "            advantages[sorted(rows)],\n",
    ),
    Mutation(
        "rows permuted: when finished rows leave the sampler",
        "rollout.py",
        "                    origin = origin[keep]\n",
        "                    origin = origin[: len(keep)]\n",
    ),
    Mutation(
        "positions counted from the left padding",
        "llms.py",
        "return (mask.long().cumsum(-1) - 1).clamp(min=0)",
        "return torch.arange(ids.shape[1]).expand_as(ids)",
    ),
    Mutation(
        "positions of the completion after the padded prompt's",
        "llms.py",
        "prompts.next_positions()[index, None]",
        "prompts.ids.shape[1]",
    ),
    Mutation(
        "reference not frozen: it is the policy",
        "main.py",
        "reference = load_llm(model_path, args.device, args.dtype, args.attn_implementation).model\n"
        "            reference.requires_grad_(False)",
        "reference = llm.model",
    ),
]


def main() -> int:
    words = [word.lower() for word in sys.argv[1:]]
    chosen = [one for one in MUTATIONS if not words or any(word in one.name.lower() for word in words)]
    for mutation in chosen:  # before an hour is spent
        mutated(mutation)
    failed, seconds = run_tests(None)
    if failed:
        sys.exit(f"the tests fail without any bug: {failed}")
    print(f"without a bug: pass ({seconds:.0f} s)", file=sys.stderr, flush=True)
    print("| bug | file | caught by |\n|---|---|---|")
    survivors = 0
    for mutation in chosen:
        failed, seconds = run_tests(mutation)
        survivors += failed is None
        print(f"| {mutation.name} | `{mutation.file}` | {f'`{failed}`' if failed else '**survived**'} |", flush=True)
        print(f"{mutation.name}: {seconds:.0f} s", file=sys.stderr, flush=True)
    print(f"\n{len(chosen) - survivors} of {len(chosen)} caught")
    return min(survivors, 1)


def mutated(mutation: Mutation) -> str:
    """The file's text with the bug in it."""
    text = (ROOT / mutation.file).read_text()
    count = text.count(mutation.old)
    if count != 1:
        sys.exit(
            f"{mutation.name}: the text to replace stands {count} times in {mutation.file}, not once:\n{mutation.old}"
        )
    return text.replace(mutation.old, mutation.new)


def run_tests(mutation: Mutation | None) -> tuple[str | None, float]:
    """-> the first test that fails on a copy with the bug, None if all pass; and the seconds it took."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "copy"
        shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
        tests = TESTS
        if mutation:
            (copy / mutation.file).write_text(mutated(mutation))
            tests = TESTS if mutation.file == "main.py" else TESTS[::-1]  # where it is likelier to be noticed first
        # TRL's loss says nothing that the papers' do not say, and takes seconds to import.
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", "not trl", *tests]
        result = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=TIMEOUT)
    seconds = time.perf_counter() - start
    if result.returncode == 0:
        return None, seconds
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", result.stdout, re.MULTILINE)
    if result.returncode != 1 or not failed:  # not a failing test but a broken run
        sys.exit(f"pytest itself failed:\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}")
    return failed[1].removeprefix("tests/"), seconds


if __name__ == "__main__":
    sys.exit(main())
