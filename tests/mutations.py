"""Would the tests notice? Puts one plausible bug at a time into a copy of the code and runs the tests on it.

    python tests/mutations.py                     all of them: prints the table of docs/mutations.md
    python tests/mutations.py "kl sign" ...       those whose name contains one of the words

A bug replaces an expression or a statement of a function. The function is found by its qualified name in any module,
and the code in its syntax tree, so that moving, wrapping and formatting code changes nothing. Names that begin with
`any_` stand for any expression. A bug that does not fit exactly once stops the script before a test runs. Without any
bug the tests have to pass.
"""

from __future__ import annotations

import ast
import copy
import importlib
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("tests/test_objectives.py", "tests/test_contracts.py")
ADAPTERS = ("tests/test_adapters.py",)
TURNS = ("tests/test_turns.py",)
PARALLEL = ("tests/test_parallel.py",)
CAPTURED = ("tests/test_rollout.py::test_a_captured_step_asks_the_gpu_for_no_value",)
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "runs", "plots", "docs", "benchmarks", "*.lock")
TIMEOUT = 1200  # seconds
# Imported once, before a process is forked for each bug: they take longer than most of the tests.
PRELOADED = ("pytest", "torch", "torchvision", "transformers.models.auto.modeling_auto")
PRELOADED += ("transformers.models.auto.processing_auto", "transformers.models.qwen2.modeling_qwen2")


@dataclass(frozen=True)
class Mutation:
    name: str
    function: str  # its qualified name, such as Decoder.emit
    old: str  # an expression or a statement in it
    new: str
    tests: tuple[str, ...] = ()  # the files that should notice it, if not TESTS


MUTATIONS = [
    Mutation(
        "advantage sign",
        "group_advantages",
        "any_groups - any_groups.mean(1, keepdim=True)",
        "any_groups.mean(1, keepdim=True) - any_groups",
    ),
    Mutation(
        "std over the wrong axis",
        "group_advantages",
        "any_groups.std(1, keepdim=True)",
        "any_groups.std(0, keepdim=True)",
    ),
    Mutation("end of sequence masked out", "Sampler.sample", "lengths.clone()", "(lengths - finished.long()).clone()"),
    Mutation("off by one in the shift", "hidden_states", "ids[:, :-1]", "ids[:, 1:]"),
    Mutation(
        "off by one in the shift, prompts not shared",
        "hidden_states_unshared",
        "any_hidden[:, any_length - 1 : -1]",
        "any_hidden[:, any_length:]",
    ),
    Mutation("temperature forgotten by the trainer", "tempered_logits", "any_logits.div_(temperature)", "any_logits"),
    Mutation("temperature forgotten by the sampler", "Decoder.emit", "any_logits /= self.temperature", "pass"),
    Mutation(
        "mean of the micro-batches' means",
        "accumulate_gradients",
        "grpo_loss(any_a, any_b, any_c, any_d, any_mask, any_e, divisor, any_f)",
        "grpo_loss(any_a, any_b, any_c, any_d, any_mask, any_e, len(rollout.micro_batches(config.micro_batch_tokens)) "
        "* loss_divisor(config.objective, any_mask, config.max_completion_length), any_f)",
    ),
    Mutation(
        "ratio without detach",
        "accumulate_gradients",
        "any_detached if old_logps is None else any_old",
        "logps if old_logps is None else any_old",
    ),
    Mutation(
        "old log-probabilities renewed at every update",
        "train",
        "any_new if old_logps is None else old_logps",
        "any_new",
    ),
    Mutation("KL sign: policy and reference exchanged", "kl_estimate", "ref_logps - logps", "logps - ref_logps"),
    Mutation(
        "KL sign: a reward for leaving",
        "grpo_loss",
        "any_loss + objective.beta * any_kl",
        "any_loss - objective.beta * any_kl",
    ),
    Mutation("mask ignored in a normalizer: tokens", "loss_divisor", "mask.sum()", "mask.numel()"),
    Mutation(
        "mask ignored in a normalizer: lengths",
        "grpo_loss",
        "mask.sum(1, keepdim=True).clamp(min=1)",
        "mask.new_full((len(mask), 1), mask.shape[1])",
    ),
    Mutation(
        "rows permuted: answers in another order than completions",
        "score",
        "[any_answer for example in examples for _ in range(any_G)]",
        "[any_answer for _ in range(any_G) for example in examples]",
    ),
    Mutation(
        "rows permuted: advantages of a micro-batch",
        "accumulate_gradients",
        "advantages[rows]",
        "advantages[sorted(rows)]",
    ),
    Mutation(
        "rows permuted: when finished rows leave the sampler", "Decoder.decode", "origin[keep]", "origin[: len(keep)]"
    ),
    Mutation(
        "positions counted from the left padding",
        "prompt_positions",
        "(mask.long().cumsum(-1) - 1).clamp(min=0)",
        "torch.arange(ids.shape[1]).expand_as(ids)",
    ),
    Mutation(
        "positions of the completion after the padded prompt's",
        "completion_positions",
        "prompts.next_positions()",
        "torch.full_like(prompts.next_positions(), prompts.ids.shape[1])",
    ),
    Mutation(
        "turns: observations in the loss",
        "Rollout.sampled_mask",
        "self.completion_mask if self.sampled is None else self.sampled",
        "self.completion_mask",
        TURNS,
    ),
    Mutation(
        "turns: observations in a normalizer",
        "accumulate_gradients",
        "loss_divisor(config.objective, mask, any_length)",
        "loss_divisor(config.objective, rollout.completion_mask, any_length)",
        TURNS,
    ),
    Mutation(
        "turns: padding of shorter conversations visible",
        "with_completions",
        "torch.cat([prompts.mask, mask], 1)",
        "torch.cat([prompts.mask, torch.ones_like(mask)], 1)",
        TURNS,
    ),
    Mutation(
        "turns: end of sequence left out of the next turn",
        "Conversation.write",
        "self.append(ids, any_positions)",
        "self.append(ids[:-1], any_positions)",
        TURNS,
    ),
    Mutation("turns: line end of an observation lost", "encode_observations", "ids[1:]", "ids[2:]", TURNS),
    Mutation(
        "turns: a picture advances the position by its tokens",
        "Conversation.append",
        "int(positions.max()) + 1",
        "len(ids)",
        TURNS,
    ),
    Mutation(
        "turns: off by one at the next turn's first token",
        "reread",
        "said.mask.sum(1) - 1",
        "said.mask.sum(1) - 2",
        TURNS,
    ),
    Mutation(
        "turns: pictures of rows permuted",
        "token_logps_and_entropy",
        "[rollout.vision[row] for row in rows]",
        "[rollout.vision[row] for row in sorted(rows)]",
        TURNS,
    ),
    Mutation(
        "turns: prompt of another group",
        "Sampler.take_turns",
        "[row // G for row in padded]",
        "[row % len(prompts) for row in padded]",
        TURNS,
    ),
    Mutation(
        "turns: observation after a turn that was cut off",
        "show_observations",
        "any_talk.finished and any_rest",
        "any_rest",
        TURNS,
    ),
    Mutation(
        "turns: observation text scored",
        "Rollout.texts_of_turns",
        "episode.texts",
        "[' '.join(turn.text + (turn.observation.text if turn.observation else '') for turn in episode.turns)]",
        TURNS,
    ),
    Mutation(
        "reference not frozen: it is the policy",
        "set_up_and_train",
        "any_reference.model.requires_grad_(False)",
        "llm.model",
    ),
    Mutation("adapters left out by the sampler", "added", "return adapted", "return product", ADAPTERS),
    Mutation("adapters not disabled in the reference", "without", "model.disable_adapters()", "pass", ADAPTERS),
    Mutation(
        "adapters without their scale",
        "add",
        "LoraConfig(r=rank, lora_alpha=alpha, target_modules=any_names, **any_kind)",
        "LoraConfig(r=rank, lora_alpha=rank, target_modules=any_names, **any_kind)",
        ADAPTERS,
    ),
    Mutation(
        "optimizer over all parameters",
        "MasterAdamW.__init__",
        "model.parameters()",
        "model.requires_grad_().parameters()",
        ADAPTERS,
    ),
    Mutation(
        "processes: each updates with its own gradients",
        "add_gradients",
        "[dist.all_reduce(gradient, async_op=True) for gradient in gradients]",
        "[]",
        PARALLEL,
    ),
    Mutation(
        "processes: a gradient that one of them lacks is left out of its sums",
        "add_gradients",
        "have.tolist()",
        "[parameter.grad is not None for parameter in parameters]",
        PARALLEL,
    ),
    Mutation("processes: gradients averaged, not added", "add_gradients", "float(size())", "1.0", PARALLEL),
    Mutation(
        "processes: loss and statistics of one alone",
        "accumulate_gradients",
        "parallel.total((loss, sums))",
        "(loss, sums)",
        PARALLEL,
    ),
    Mutation(
        "processes: norm of a part of the gradient",
        "MasterAdamW.step",
        "parallel.whole(torch.nn.utils.clip_grad_norm_(self.masters, largest))",
        "torch.nn.utils.get_total_norm([getattr(one.grad, '_local_tensor', one.grad) for one in self.masters])",
        PARALLEL,
    ),
    Mutation(
        "processes: the same random numbers in each",
        "SharedSampler.sample",
        "self.rows_drawn + first",
        "self.rows_drawn",
        PARALLEL,
    ),
    Mutation(
        "a CUDA graph's step asks the GPU for a value",
        "Decoder.advance",
        "self.slot += 1",
        "self.slot[0] = self.slot.item() + 1",
        CAPTURED,
    ),
]


def main() -> int:
    words = [word.lower() for word in sys.argv[1:]]
    chosen = [one for one in MUTATIONS if not words or any(word in one.name.lower() for word in words)]
    modules = {path.name: ast.parse(path.read_text()) for path in sorted(ROOT.glob("*.py"))}
    mutated = {one: mutate(modules, one) for one in chosen}  # before an hour is spent
    failed, seconds = run_tests(tuple(sorted({file for one in chosen for file in one.tests or TESTS})))
    if failed:
        sys.exit(f"the tests fail without any bug: {failed}")
    print(f"without a bug: pass ({seconds:.0f} s)", file=sys.stderr, flush=True)
    print("| bug | file | caught by |\n|---|---|---|")
    survivors = 0
    for one, (file, text) in mutated.items():
        # first those that are likelier to notice
        failed, seconds = run_tests(one.tests or (TESTS if file == "main.py" else TESTS[::-1]), file, text)
        survivors += failed is None
        print(f"| {one.name} | `{file}` | {f'`{failed}`' if failed else '**survived**'} |", flush=True)
        print(f"{one.name}: {seconds:.0f} s", file=sys.stderr, flush=True)
    print(f"\n{len(chosen) - survivors} of {len(chosen)} caught")
    return min(survivors, 1)


# --- Finding a place in the code ---


def mutate(modules: dict[str, ast.Module], mutation: Mutation) -> tuple[str, str]:
    """-> the name of the file and its text with the bug in it. Exits if there is not exactly one place for it."""
    homes = [(file, tree) for file, tree in modules.items() if any(functions(tree, mutation.function))]
    if len(homes) != 1:
        sys.exit(f"{mutation.name}: the function {mutation.function} is in {len(homes)} modules, not in one")
    file, tree = homes[0][0], copy.deepcopy(homes[0][1])
    edit = Replace(mutation.old, mutation.new)
    for function in functions(tree, mutation.function):
        edit.visit(function)
    if edit.count != 1:
        sys.exit(f"{mutation.name}: found {edit.count} times in {mutation.function} ({file}), not once: {mutation.old}")
    return file, ast.unparse(tree)


def functions(tree: ast.AST, name: str) -> Iterator[ast.AST]:
    """The functions and methods of a module with this qualified name."""
    first, _, rest = name.partition(".")
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == first:
            if rest:
                yield from functions(node, rest)
            elif isinstance(node, ast.FunctionDef):
                yield node


class Replace(ast.NodeTransformer):
    """Replaces each piece of code that equals `old`, where names that begin with `any_` equal any expression."""

    def __init__(self, old: str, new: str):
        self.old, self.new = parse(old), parse(new)
        self.count = 0

    def visit(self, node: ast.AST) -> ast.AST:
        bound: dict[str, ast.AST] = {}
        if matches(self.old, node, bound):
            self.count += 1
            return Fill(bound).visit(copy.deepcopy(self.new))
        return self.generic_visit(node)


class Fill(ast.NodeTransformer):
    """Puts the matched expressions in the place of their names."""

    def __init__(self, bound: dict[str, ast.AST]):
        self.bound = bound

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return copy.deepcopy(self.bound.get(node.id, node))


def parse(code: str) -> ast.AST:
    """The syntax tree of one expression or statement."""
    (statement,) = ast.parse(code).body
    return statement.value if isinstance(statement, ast.Expr) else statement


def matches(pattern: object, code: object, bound: dict[str, ast.AST]) -> bool:
    """Is `code` what `pattern` describes? Fills `bound` with the expressions that the `any_` names stand for."""
    if isinstance(pattern, ast.Name) and pattern.id.startswith("any_") and isinstance(code, ast.expr):
        known = bound.setdefault(pattern.id, code)
        return ast.dump(known) == ast.dump(code)
    if isinstance(pattern, list):
        pairs = zip(pattern, code, strict=False) if isinstance(code, list) and len(code) == len(pattern) else None
        return pairs is not None and all(matches(one, other, bound) for one, other in pairs)
    if not isinstance(pattern, ast.AST):
        return pattern == code
    if type(pattern) is not type(code):
        return False
    fields = (name for name in pattern._fields if name != "ctx")  # whether a name is read or written
    return all(matches(getattr(pattern, name), getattr(code, name), bound) for name in fields)


# --- Running the tests ---


def run_tests(tests: tuple[str, ...], file: str | None = None, text: str = "") -> tuple[str | None, float]:
    """-> the first test that fails on a copy with the changed file, None if all pass; and the seconds it took."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        checkout, output = Path(place) / "copy", Path(place) / "output.txt"
        shutil.copytree(ROOT, checkout, ignore=LEFT_OUT)
        if file:
            (checkout / file).write_text(text)
        process = multiprocessing.get_context("fork").Process(target=run_pytest, args=(checkout, tests, output))
        process.start()
        process.join(TIMEOUT)
        process.kill()
        printed = output.read_text()
    seconds = time.perf_counter() - start
    if process.exitcode == 0:
        return None, seconds
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", printed, re.MULTILINE)
    if process.exitcode != 1 or not failed:  # 1: a test failed
        sys.exit(f"pytest itself failed ({process.exitcode}):\n{printed[-6000:]}")
    return failed[1].removeprefix("tests/"), seconds


def run_pytest(checkout: Path, tests: tuple[str, ...], output: Path) -> None:
    """Run the tests of another checkout in this process, up to the first that fails."""
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(checkout)
    sys.path.remove(str(ROOT / "tests"))
    # TRL takes seconds to import, and its loss is compared with formulas that other tests compare with too.
    sys.exit(importlib.import_module("pytest").main(["-x", "-q", "-p", "no:cacheprovider", "-k", "not trl", *tests]))


if __name__ == "__main__":
    for module in PRELOADED:
        importlib.import_module(module)
    sys.exit(main())
