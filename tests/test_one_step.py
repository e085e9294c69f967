"""docs/one_step.md is what one_step.py prints, and its numbers fit together.

A model that is warmed up on another machine gives other numbers. So the page is compared with one from a small model in
its text alone, and the relations between the numbers are checked on both pages, up to the digits that they show.
"""

import math
import re

import pytest
from runs import ROOT, handlers_restored, one_line

import one_step
from config import parse_args

COMMITTED = (ROOT / "docs/one_step.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def printed(task_models):
    """The page of a small model."""
    small = f"--model_path {task_models['arithmetic']} --dataset_options steps=1 --max_steps 2 --train_size 64"
    return one_step.page(parse_args([*one_step.FLAGS.split(), *small.split()]))


@pytest.fixture(params=["committed", "printed"])
def page(request):
    return COMMITTED if request.param == "committed" else request.getfixturevalue("printed")


def text_of(page: str) -> str:
    """The page without numbers, rows of numbers and completions; the tables of sources stay."""
    page = re.sub(r"Prompt \d+:\n\n```\n.*?\n```\n", "", page, flags=re.DOTALL)
    lines = [line for line in page.splitlines() if not line.startswith("| ") or re.match(r"\|[^|]*[a-zA-Z]", line)]
    return " ".join(NUMBER.sub("N", "\n".join(lines)).split())


def tables(page: str) -> dict[str, list[dict[str, str]]]:
    """The rows of each table of numbers, by the table's last column."""
    found: dict[str, list[dict[str, str]]] = {}
    for block in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        head, rule, *rows = (
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.split("\n")[:-1]
        )
        if rule[0] == "---:":
            found[head[-1]] = [dict(zip(head, row, strict=True)) for row in rows]
    return found


def column(rows: list[dict[str, str]], name: str) -> list[float]:
    return [float(row[name]) for row in rows]


def settings(page: str) -> tuple[int, int, float]:
    """(G, B, β) as the page states them."""
    found = re.search(r"G = (\d+) completions.*?B = Q·G\s=\s(\d+) rows.*?β\s=\s([\d.]+)\.", page, re.DOTALL)
    return int(found[1]), int(found[2]), float(found[3])


def test_the_committed_page_has_the_script_s_text(printed):
    """Otherwise: python one_step.py > docs/one_step.md"""
    assert text_of(COMMITTED) == text_of(printed)


def test_the_committed_page_has_the_script_s_flags():
    """Its text is compared without numbers, and these do not depend on the machine."""
    config = parse_args(one_step.FLAGS.split())
    batch = config.prompts_per_step * config.num_generations
    assert settings(COMMITTED) == (config.num_generations, batch, config.objective.beta)
    assert float(re.search(r"the learning rate,\s([\d.]+)\.", COMMITTED)[1]) == config.learning_rate


def test_advantages_follow_from_the_rewards(page):
    group, batch, _ = settings(page)
    rows = tables(page)["A"]
    assert len(rows) == batch
    for first in range(0, batch, group):
        members = rows[first : first + group]
        totals = column(members, "R")
        mean = sum(totals) / group
        std = math.sqrt(sum((total - mean) ** 2 for total in totals) / (group - 1))
        assert std > 0
        for row, total in zip(members, totals, strict=True):
            parts = [float(row[name]) for name in list(row)[2 : list(row).index("R")]]
            assert total == pytest.approx(sum(parts), abs=1e-3)
            assert [float(row["mean"]), float(row["std"])] == pytest.approx([mean, std], abs=1e-4)
            assert float(row["A"]) == pytest.approx((total - mean) / (std + 1e-4), abs=1e-3)


def test_ratio_kl_share_and_slope_follow_from_log_probabilities(page):
    _, batch, beta = settings(page)
    rows = tables(page)["slope"]
    chosen, advantage = re.search(r"row (\d+), A = ([\d.]+)", page).groups()
    divisor = batch * len(rows)
    for row in rows:
        logp, sampled, reference = (float(row[name]) for name in ("log π", "log π sampled", "log π_ref"))
        assert logp == pytest.approx(sampled, abs=5e-5) and row["ratio"] == "1.0000"
        gap = reference - logp
        kl = math.exp(gap) - gap - 1
        assert float(row["KL"]) == pytest.approx(kl, abs=2e-5 * (1 + math.exp(gap)))
        assert float(row["share of the loss"]) == pytest.approx((-float(advantage) + beta * kl) / divisor, abs=1e-5)
        slope = (-float(advantage) + beta * (1 - math.exp(gap))) / divisor
        assert float(row["slope"]) == pytest.approx(slope, abs=1e-5)
    total = float(re.search(rf"shares of row {chosen} add up to ([-\d.]+)\.", page)[1])
    assert sum(column(rows, "share of the loss")) == pytest.approx(total, abs=1e-6 * len(rows))


def test_the_shares_add_up_to_the_loss(page):
    _, batch, beta = settings(page)
    rows = tables(page)["share of the loss"]
    assert [float(row["share of the loss"]) for row in rows] == pytest.approx(
        [(-float(row["A"]) + beta * float(row["mean KL"])) / batch for row in rows], abs=2e-5
    )
    loss = float(re.search(r"sum of\s+the\s+last\s+column:\s+([-\d.]+)\.", page)[1])
    assert sum(column(rows, "share of the loss")) == pytest.approx(loss, abs=1e-6 * batch)
    chosen = int(re.search(r"row (\d+), A =", page)[1])
    assert float(rows[chosen]["tokens"]) == len(tables(page)["slope"])


def test_the_update_moves_the_completions_as_it_says(page):
    rows, tokens, before = (tables(page)[name] for name in ("times as likely", "ratio", "slope"))
    for row in (*rows, *tokens):
        change, rounding = float(row["log π after"]) - float(row["log π before"]), 1e-6 * abs(float(row["log π after"]))
        assert change == pytest.approx(float(row["change"]), abs=3e-5 + rounding)
        assert float(row[list(row)[-1]]) == pytest.approx(math.exp(change), rel=1e-4 + rounding, abs=1e-4)
    assert column(tokens, "log π before") == column(before, "log π")
    chosen = int(re.search(r"row (\d+), A =", page)[1])
    for name in ("log π before", "log π after"):
        assert sum(column(tokens, name)) == pytest.approx(float(rows[chosen][name]), abs=1e-5 * len(tokens))
    assert any(float(row["change"]) for row in rows)
    signs = [(float(row["A"]), float(row["change"])) for row in rows]
    counts = [sum(a > 0 for a, _ in signs), sum(a > 0 and c > 0 for a, c in signs)]
    counts += [sum(a < 0 for a, _ in signs), sum(a < 0 and c < 0 for a, c in signs)]
    told = re.search(r"Of the (\d+) .*?, (\d+)\s+became.*?the\s+(\d+)\s.*?, (\d+)\s+became", page, re.DOTALL)
    assert [int(count) for count in told.groups()] == counts


def test_another_objective_is_refused(capsys):
    with handlers_restored():
        config = parse_args([*one_step.FLAGS.split(), "--objective", "gspo"])
        assert one_step.exit_status(one_step.write_page, config) == 2
    assert "--objective grpo" in one_line(capsys.readouterr().err)
