"""The plan of the memory: its parts against what a model really allocates, the choice, the refusal, what is free."""

import dataclasses
import shutil
import subprocess
import sys

import pytest
import runs
import torch
from runs import one_line, read, records, small_flags
from sampling import draw
from small_models import questions, small_config
from transformers import AutoModelForCausalLM

import adapters
import memory
from llms import recompute_activations
from logprobs import token_logps
from memory import CHOICES, GB, OutOfMemory, Room, Shape, choose, estimate, refusal, room_of, savings, shape_of
from optimizer import MasterAdamW
from rollout import Sampler

small_run, refused = runs.small_run, runs.refused  # fixtures

# Qwen2.5-0.5B in bfloat16.
HALF_B = Shape(
    parameters=494_032_768,
    trained=494_032_768,
    size=2,
    layers=24,
    hidden=896,
    inner=4864,
    queries=896,
    keys=128,
    vocabulary=151_936,
)
MACHINE = Room(free=24 * GB, total=24 * GB)


def settings(flags: str = ""):
    return small_config("--prompts_per_step 3 --num_generations 3 --max_completion_length 12 --beta 0", flags)


def kept_bytes(llm, rollout, share_prompt: bool = True) -> int:
    """What autograd keeps for the backward pass: each memory once, the weights aside."""
    weights = {weight.untyped_storage().data_ptr() for weight in llm.model.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        memory_of_it = tensor.untyped_storage()
        if memory_of_it.data_ptr() not in weights:
            kept[memory_of_it.data_ptr()] = (memory_of_it.nbytes(), tensor)  # alive, so that no address is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        token_logps(llm, rollout, share_prompt=share_prompt).sum()
    return sum(size for size, _ in kept.values())


# ---------------------------------------------------------------------------------------------------------------------
# The parts


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])  # the head of llama is no embedding
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_copies_and_moments_are_what_is_allocated(load, family, dtype):
    llm = load(family, dtype)
    plan = estimate(settings(), shape_of(settings(), llm, None, questions(family)), 256)
    optimizer = MasterAdamW(llm.model, settings())

    def size(tensors) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    assert plan.weights == size(llm.model.parameters())
    assert plan.masters == (0 if dtype == "float32" else size(optimizer.masters))
    states = optimizer.adamw.state.values()
    assert plan.moments == size(tensor for state in states for tensor in (state["exp_avg"], state["exp_avg_sq"]))
    head = llm.model.get_output_embeddings().weight
    assert plan.gradients == size(optimizer.masters)
    assert plan.newest_gradients == size([head]) * (1 if family == "llama" else 2)


def planned_activations(config, llm, family, rollout, num_layers: int) -> int:
    shape = shape_of(config, llm, None, questions(family))
    shape = dataclasses.replace(shape, prompt=rollout.prompt_ids.shape[1], layers=num_layers)
    return estimate(config, shape, 10_000).activations


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("fast", [True, False])
def test_activations_are_what_autograd_keeps(load, family, fast):
    llm = load(family, "float32", "sdpa")
    llm.model.fast_layers_differ = not fast
    rollout = draw(llm, family, ignore_eos=True)
    whole, none = (planned_activations(settings(), llm, family, rollout, layers) for layers in (2, 0))
    computed = (whole - none) / 2  # the layer being computed, which is planned beside those that are kept
    assert kept_bytes(llm, rollout) == pytest.approx(whole - computed, rel=0.15)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_keep_what_was_planned(load, dtype):
    pytest.importorskip("peft")
    llm = load("qwen2", dtype, "sdpa")
    adapters.add(llm, 1, 32)
    rollout, config = draw(llm, "qwen2", ignore_eos=True), settings("--lora_rank 1")
    whole, none = (planned_activations(config, llm, "qwen2", rollout, layers) for layers in (2, 0))
    assert kept_bytes(llm, rollout) == pytest.approx(whole - (whole - none) / 2, rel=0.15)


def test_recomputing_keeps_what_was_planned(load):
    """The layer being recomputed is planned, and is not yet there after the forward pass."""
    llm = load("llama", "float32", "sdpa")
    rollout = draw(llm, "llama", ignore_eos=True)
    recompute_activations(llm.model)
    llm.model.train()
    config = settings("--gradient_checkpointing")
    whole, none = (planned_activations(config, llm, "llama", rollout, layers) for layers in (2, 0))
    assert whole - none < kept_bytes(llm, rollout, share_prompt=False) < whole


def test_the_cache_is_what_the_sampler_allocates(load):
    llm = load("qwen3", "float32")
    config = settings("--eval_batch_size 2")
    rollout = draw(llm, "qwen3")
    shape = dataclasses.replace(shape_of(config, llm, None, questions("qwen3")), prompt=rollout.prompt_ids.shape[1])
    sampler = Sampler(llm)
    sampler.sample(questions("qwen3"), 3, 12)
    allocated = sum(x.numel() * x.element_size() for pair in sampler.decoder.caches for x in pair)
    slots = sampler.decoder.slots / (shape.prompt + 12)  # rounded up
    assert estimate(config, shape, 256).key_value_cache * slots == pytest.approx(allocated)


def test_pictures_count():
    config, blind = settings(), HALF_B
    seeing = dataclasses.replace(blind, patches=256, tower=32 * 12 * 1280)
    assert estimate(config, seeing, 1024).activations > estimate(config, blind, 1024).activations + 256 * 32 * 1280


def test_evaluating_alone_needs_no_training():
    plan = estimate(settings("--eval_only"), HALF_B, 1024)
    assert plan.weights and plan.key_value_cache and plan.sampling
    assert plan.gradients == plan.moments == plan.masters == plan.activations == plan.logits == 0


def test_a_reference_is_a_second_set_of_weights():
    config = settings("--beta 0.1")
    assert estimate(config, HALF_B, 1024).reference == estimate(config, HALF_B, 1024).weights
    assert estimate(settings(), HALF_B, 1024).reference == 0


# ---------------------------------------------------------------------------------------------------------------------
# The choice


BIG_STEP = "--prompts_per_step 16 --num_generations 16 --max_completion_length 128"


@pytest.mark.parametrize("on_cpu", [False, True])
def test_auto_grows_with_the_memory_and_fits(on_cpu):
    shape, chosen = dataclasses.replace(HALF_B, on_cpu=on_cpu), []
    for gigabytes in range(12, 80, 4):
        room = Room(gigabytes * GB, 80 * GB)
        try:
            config, plan = choose(settings(BIG_STEP), shape, room)
        except OutOfMemory:
            assert not chosen
            continue
        assert room.holds(plan) and config.micro_batch_tokens in CHOICES
        chosen.append(config.micro_batch_tokens)
    assert chosen == sorted(chosen) and chosen[0] < chosen[-1]
    assert (chosen[-1] == CHOICES[0]) == (not on_cpu)  # a CPU computes small ones as fast


def test_auto_is_the_most_where_the_system_tells_nothing():
    assert choose(settings(), HALF_B, None)[0].micro_batch_tokens >= 1024


def test_a_given_number_stays():
    config, plan = choose(settings("--micro_batch_tokens 700"), HALF_B, dataclasses.replace(MACHINE, free=GB))
    assert config.micro_batch_tokens == 700
    assert "warning" in memory.plan_lines(config, "as given", plan, dataclasses.replace(MACHINE, free=GB))
    assert "warning" not in memory.plan_lines(config, "as given", plan, MACHINE)
    with pytest.raises(OutOfMemory):
        choose(settings("--micro_batch_tokens 700"), HALF_B, Room(8 * GB, 8 * GB))


def test_a_resumed_run_keeps_its_number():
    """Another one would round otherwise, even where less memory is free now."""
    for room in (MACHINE, Room(11 * GB, 24 * GB), None):
        assert choose(settings(BIG_STEP), HALF_B, room, began=4096)[0].micro_batch_tokens == 4096
    assert choose(settings(f"{BIG_STEP} --micro_batch_tokens 300"), HALF_B, MACHINE, 4096)[0].micro_batch_tokens == 300


def test_what_does_not_fit_is_refused_with_flags_that_help():
    config = settings(f"{BIG_STEP} --beta 0.1")
    with pytest.raises(OutOfMemory) as error:
        choose(config, HALF_B, Room(4 * GB, 24 * GB))
    text = str(error.value)
    assert all(flag in text for flag in ("--beta 0", "--num_generations 8", "--max_completion_length 64"))
    assert "4.0 GB of 24.0 GB" in text and "--dtype bfloat16" not in text  # it has that dtype already
    assert "--beta 0" not in refusal(settings(BIG_STEP), HALF_B, MACHINE, 256)


def test_every_saving_is_what_its_flag_saves():
    config = settings(f"{BIG_STEP} --beta 0.1")
    whole = estimate(config, HALF_B, 4096).peak
    found = savings(config, HALF_B, 4096)
    assert found["--beta 0"] == whole - estimate(settings(BIG_STEP), HALF_B, 4096).peak
    assert found["--micro_batch_tokens 256"] == whole - estimate(config, HALF_B, 256).peak
    assert all(size > whole / 100 for size in found.values())


# ---------------------------------------------------------------------------------------------------------------------
# What is free


def system(folder, limits: dict[str, str], groups: str):
    """A fake root with 16 GiB, of which 8 are free, and a process that holds 1."""
    files = {
        "proc/meminfo": "MemTotal: 16777216 kB\nMemFree: 100 kB\nMemAvailable: 8388608 kB\n",
        "proc/self/status": "Name:\tpython\nVmRSS:\t 1572864 kB\nRssAnon:\t 1048576 kB\n",
        "proc/self/cgroup": groups,
        **limits,
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


VERSION_1 = "sys/fs/cgroup/memory"
CASES = {
    "no limit": ({}, "", 9, 16),
    "version 2": (
        {
            "sys/fs/cgroup/job/memory.max": f"{6 * GB}\n",
            "sys/fs/cgroup/job/memory.current": f"{4 * GB}\n",
            "sys/fs/cgroup/job/memory.stat": f"anon {2 * GB}\ninactive_file {GB}\nactive_file {GB}\n",
        },
        "0::/job/inner\n",
        *(5, 6),  # the group above has 4 left: 2 of its files do not count
    ),
    "version 2, no limit": (
        {"sys/fs/cgroup/job/memory.max": "max\n", "sys/fs/cgroup/job/memory.current": "5\n"}, "0::/job\n", 9, 16,
    ),
    "version 1": (
        {
            f"{VERSION_1}/memory.limit_in_bytes": f"{5 * GB}",
            f"{VERSION_1}/memory.usage_in_bytes": f"{4 * GB}",
            f"{VERSION_1}/memory.stat": f"cache {GB}\ntotal_inactive_file {GB}\ntotal_active_file 0\n",
        },
        "9:cpu:/\n4:memory:/not/mounted/here\n",
        *(3, 5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_limits_of_control_groups_count(tmp_path, case):
    limits, groups, free, total = CASES[case]
    room = room_of(torch.device("cpu"), system(tmp_path, limits, groups))
    assert (room.free / GB, room.total / GB) == (free, total)


def test_a_system_that_does_not_tell_sets_no_limit(tmp_path):
    assert room_of(torch.device("cpu"), tmp_path) is None


# ---------------------------------------------------------------------------------------------------------------------
# In a run


def test_a_run_prints_its_plan_and_logs_the_number(small_run, capsys):
    folder = small_run("arithmetic", "--max_steps 1")
    text = capsys.readouterr().out
    assert "memory: about" in text and "8,192 tokens (auto)" in text
    kept = read(folder / "config.json")
    assert kept["flags"]["micro_batch_tokens"] == 8192
    assert kept["planned_memory_gb"]["peak"] > kept["planned_memory_gb"]["libraries"] > 0


def test_a_run_that_cannot_fit_is_refused(refused, monkeypatch):
    monkeypatch.setattr(memory, "held", lambda: 0)  # of this process, in which other tests ran
    monkeypatch.setattr(memory, "room_of", lambda device: Room(GB // 100, 4 * GB))
    line = refused("--beta", "0.1")
    assert "0.010 GB of 4.0 GB" in line and "--micro_batch_tokens 256" in line


def test_weights_that_do_not_fit_are_refused_before_they_are_read(refused, monkeypatch):
    monkeypatch.setattr(memory, "held", lambda: 0)
    monkeypatch.setattr(memory, "room_of", lambda device: Room(GB // 10**6, 4 * GB))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    line = refused("--dtype", "float32")
    assert "GB in float32, and 0.000 GB of 4.0 GB are free" in line and "--dtype bfloat16" in line


def enlarge(folder, target) -> None:
    """Save a random model of the same family, with 20 to 40 M parameters: its memory counts beside the libraries."""
    import transformers

    shutil.copytree(folder, target)
    config = transformers.AutoConfig.from_pretrained(folder)
    text, kind = config.get_text_config(), transformers.AutoModelForCausalLM
    text.vocab_size, text.hidden_size, text.intermediate_size = 30_000, 512, 2048
    text.num_attention_heads, text.head_dim = 8, 64
    if hasattr(config, "vision_config"):
        kind, config.vision_config.hidden_size = transformers.AutoModelForImageTextToText, 512
        text.rope_parameters["mrope_section"] = [16, 8, 8]
    kind.from_config(config).save_pretrained(target)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell what the process holds")
@pytest.mark.parametrize("family, dtype", [("llama", "bfloat16"), ("qwen2_vl", "float32")])
def test_the_plan_is_near_the_measured_peak(model_folder, tmp_path, family, dtype):
    enlarge(model_folder(family), tmp_path / family)
    flags = small_flags("correlation" if "vl" in family else "arithmetic", tmp_path / family, tmp_path / "run")
    flags += f"--dtype {dtype} --num_generations 16 --max_completion_length 48 --max_steps 1 --beta 0".split()
    subprocess.run([sys.executable, "main.py", *flags], cwd=runs.ROOT, check=True, capture_output=True)
    planned = read(tmp_path / "run/config.json")["planned_memory_gb"]["peak"]
    measured = read(tmp_path / "run/train_logs.json")[-1]["peak_memory_gb"]
    assert planned == pytest.approx(measured, rel=0.15)


@pytest.mark.slow
def test_resuming_with_another_number_changes_rounding_only(small_run):
    whole = records(small_run("arithmetic", "--max_steps 4", name="whole"))
    small_run("arithmetic", "--max_steps 2", name="cut")
    folder = small_run("arithmetic", "--max_steps 4 --resume --micro_batch_tokens 90", name="cut")
    assert read(folder / "config.json")["flags"]["micro_batch_tokens"] == 90
    for one, other in zip(records(folder), whole, strict=True):
        assert one["reward"] == other["reward"]
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    small_run("arithmetic", "--max_steps 5 --resume", name="cut")  # auto: the number that it has
    assert read(folder / "config.json")["flags"]["micro_batch_tokens"] == 90


def test_lack_of_memory_on_a_cpu_is_one_line(small_run, monkeypatch, capsys):
    """The real error of torch's allocator."""
    monkeypatch.setattr("main.accumulate_gradients", lambda *args: torch.empty(2**58))
    small_run("arithmetic", status=2)
    line = one_line(capsys.readouterr().err)
    assert "this machine is out of memory" in line and "--micro_batch_tokens (now auto)" in line
