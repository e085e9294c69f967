"""Several processes compute what one computes (contract 2), write one run folder, and stop together."""

import json
import math

import pytest
from runs import ROOT, contents, evaluations, one_line, python, read, records, small_flags
from safetensors.torch import load_file
from sampling import draw
from small_models import picture, small_config

import parallel
from rollout import SharedSampler

TEXT = "--prompts_per_step 4 --objective dapo --micro_batch_tokens 150 --num_iterations 2 --max_steps 6"
VISION = "--prompts_per_step 4 --objective grpo --micro_batch_tokens 300 --eval_samples 2 --max_steps 3"
LORA = "--prompts_per_step 4 --lora_rank 4 --scale_rewards batch --max_steps 3"
RESUMED = f"{TEXT} --resume"
NAN, ERROR, SIGNAL = ({"kind": kind, "rank": 1, "step": 2} for kind in ("nan", "error", "signal"))


@pytest.fixture(scope="module")
def worlds(task_models, tmp_path_factory):
    """Folders by name, and what tests/parallel_worlds.py printed: its results, its standard error."""
    base = tmp_path_factory.mktemp("worlds")

    def one(name, flags, task="arithmetic", **more):
        return {"argv": [*small_flags(task, task_models[task], base / name), *flags.split()], **more}

    def same(size):
        return [
            one(f"text{size}", TEXT),
            one(f"vision{size}", VISION, "correlation"),
            one(f"lora{size}", LORA),
            one(f"mixed{size}", mixed_flags(base), "correlation"),
        ]

    plan = [
        {"size": 1, "runs": [*same(1), one("layers1", TEXT, layers="transformers")]},
        {
            "size": 2,
            "runs": [
                *same(2),
                one("text2 divided", f"{TEXT} --fsdp_size 2"),
                one("layers2 divided", f"{TEXT} --fsdp_size 2", layers="transformers"),
                one("vision2 divided", f"{VISION} --fsdp_size 2", "correlation"),
                one("skipped", TEXT, fault=NAN),
                one("resumed", f"{TEXT} --fsdp_size 2", fault=SIGNAL),
            ],
        },
        {"size": 1, "runs": [one("resumed", f"{RESUMED} --max_steps 4")]},
        {"size": 4, "runs": [*same(4)[:2], one("resumed", f"{RESUMED} --fsdp_size 2")]},
        {"size": 2, "runs": [one("failed", TEXT, fault=ERROR)]},
    ]
    (base / "plan.json").write_text(json.dumps(plan))
    one_thread = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done, _ = python(ROOT / "tests/parallel_worlds.py", base / "plan.json", **one_thread)
    assert done.returncode == 0, done.stderr[-3000:]
    return base, json.loads(done.stdout.splitlines()[-1]), done.stderr


def mixed_flags(folder):
    """Flags of a task whose every second question has a picture, and steps of two questions."""
    for split, count in (("train", 24), ("test", 5)):
        rows = [{"question": "How much is it?", "answer": "0.5"} for _ in range(count)]
        for number, row in enumerate(rows[::2]):
            picture(32, 32, number).save(folder / f"{split}{number}.png")
            row["image"] = f"{split}{number}.png"
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = f"--dataset_name jsonl --dataset_path {folder}/train.jsonl --dataset_options test={folder}/test.jsonl"
    return f"{data} --prompts_per_step 2 --beta 0.1"


def weights(folder):
    return load_file(max((folder / "checkpoints").glob("step_*")) / "model.safetensors")


def assert_same_run(folder, other, close=1e-9):
    """Every logged number to 1e-6, those that depend on the loss in float64 to `close`, and the weights too."""
    found, expected = records(folder), records(other)
    assert len(found) == len(expected) > 0
    for record, wanted in zip(found, expected, strict=True):
        assert record.keys() == wanted.keys()
        for name, value in wanted.items():
            exact = name in ("loss", "grad_norm", "kl", "reward", "tokens", "entropy")
            assert record[name] == pytest.approx(value, abs=close if exact else 1e-6), (record["step"], name)
    ours, theirs = evaluations(folder), evaluations(other)
    assert ours.keys() == theirs.keys()
    for step, metrics in theirs.items():
        assert ours[step] == pytest.approx(metrics, abs=close)
    if not (folder / "checkpoints/step_000003/adapter_model.safetensors").exists():
        after, before = weights(folder), weights(other)
        assert after.keys() == before.keys()
        assert max(float((after[name] - before[name]).abs().max()) for name in before) < close


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text2", "text4", "vision2", "vision4", "lora2", "mixed2"])
def test_replicas_compute_what_one_process_does(worlds, name):
    """Of the mixed questions often only one process has a picture, and so a gradient of the vision tower. The others
    then run layers.py, and one process transformers' layers, whose rotary positions are in float32."""
    close = 1e-6 if name.startswith("mixed") else 1e-9
    assert_same_run(worlds[0] / name, worlds[0] / f"{name[:-1]}1", close)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text2 divided", "layers2 divided", "vision2 divided"])
def test_divided_weights_learn_what_whole_ones_do(worlds, name):
    """As one unit for layers.py; as a unit for each layer for transformers' layers, which a GPU runs."""
    assert_same_run(worlds[0] / name, worlds[0] / f"{name.split('2')[0]}1")


@pytest.mark.slow
def test_the_runs_learn_from_varied_rewards(worlds):
    for name in ("text1", "vision1", "lora1", "mixed1"):
        found = records(worlds[0] / name)
        assert min(record["grad_norm"] for record in found) > 0
        assert max(record["zero_std_fraction"] for record in found) < 1


@pytest.mark.slow
def test_a_run_may_change_its_number_of_processes(worlds):
    """Two processes, of which one gets SIGTERM, with divided weights; then one; then four, with divided weights."""
    assert_same_run(worlds[0] / "resumed", worlds[0] / "text1")


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all(worlds):
    statuses = worlds[1][1]["statuses"]
    assert {rank: found[-1] for rank, found in statuses.items()} == {"0": 143, "1": 143}


@pytest.mark.slow
def test_a_step_is_skipped_by_all_or_none(worlds):
    found = records(worlds[0] / "skipped")
    assert [record["skipped_steps"] for record in found] == [0, 1, 0, 0, 0, 0]
    assert found[1]["grad_norm"] is None and all(math.isfinite(record["loss"]) for record in found)


@pytest.mark.slow
def test_one_process_alone_writes(worlds):
    folders = worlds[0] / "text1", worlds[0] / "text4"
    one, four = ({path.relative_to(folder) for path in contents(folder)} for folder in folders)
    assert one == four
    assert read(worlds[0] / "text4/config.json")["resolved"]["processes"] == 4


@pytest.mark.slow
def test_an_error_in_one_process_ends_all(worlds):
    _, found, error = worlds
    assert found[-1]["statuses"] == {"0": [2], "1": [2]}
    assert found[-1]["seconds"] < 60
    assert "process 1 of 2: this reward server does not answer" in error


# ---------------------------------------------------------------------------------------------------------------------


def torchrun(monkeypatch, rank, size):
    for name, value in {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}.items():
        monkeypatch.setenv(name, str(value))


def test_processes_that_cannot_share_are_refused(monkeypatch, capsys):
    torchrun(monkeypatch, 0, 3)
    with pytest.raises(SystemExit) as refused:
        small_config("--prompts_per_step 8")
    line = one_line(capsys.readouterr().err)
    assert refused.value.code == 2 and "6 or 9" in line and "1, 2, 4, 8" in line
    with pytest.raises(SystemExit):
        small_config("--prompts_per_step 9 --fsdp_size 2")
    assert "1, 3" in one_line(capsys.readouterr().err)
    torchrun(monkeypatch, 1, 3)
    with pytest.raises(SystemExit):
        small_config("--prompts_per_step 8")
    assert capsys.readouterr().err == ""  # one line, not one from each process


def test_divided_weights_need_processes_and_no_adapters(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        small_config("--fsdp_size 2")
    assert "1 processes" in one_line(capsys.readouterr().err)
    torchrun(monkeypatch, 0, 2)
    with pytest.raises(SystemExit):
        small_config("--fsdp_size 2 --lora_rank 4")
    assert "--lora_rank" in one_line(capsys.readouterr().err)


def test_shares_are_disjoint_and_complete(monkeypatch):
    for size, count in ((1, 5), (2, 8), (4, 5), (8, 3)):
        monkeypatch.setattr(parallel, "size", lambda size=size: size)
        shares = [list(parallel.share(count, rank)) for rank in range(size)]
        assert [one for found in shares for one in found] == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_micro_batches_are_shared(monkeypatch, load):
    rollout, found = draw(load("qwen2"), "qwen2"), []
    for rank in (0, 1):
        monkeypatch.setattr(parallel, "size", lambda: 2)
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        found += [row for rows in rollout.micro_batches(60) for row in rows]
    assert sorted(found) == list(range(len(rollout.completion_ids)))


def test_divided_models_need_as_many_passes(monkeypatch):
    monkeypatch.setattr(parallel, "most", lambda number: 3)
    assert list(parallel.padded([[0, 1], [2]], object())) == [([0, 1], 1.0), ([2], 1.0), ([2], 0.0)]
    assert list(parallel.padded([[0, 1], [2]], None)) == [([0, 1], 1.0), ([2], 1.0)]


def test_random_numbers_belong_to_rows(load):
    """Two samplers of half of the rows have the numbers that one sampler of all rows has."""
    whole, half = SharedSampler(load("qwen2"), 3), SharedSampler(load("qwen2"), 3)
    half.first_row = 2
    numbers = whole.uniform_numbers(range(4), 0, 7)
    assert (numbers[2:] == half.uniform_numbers(range(2), 0, 7)).all()
    assert (numbers != whole.uniform_numbers(range(4), 1, 7)).any()
    with whole.seeded(4):
        assert (numbers != whole.uniform_numbers(range(4), 0, 7)).any()
    assert (numbers == whole.uniform_numbers(range(4), 0, 7)).all()
