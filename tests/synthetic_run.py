"""Makes a run folder with made-up numbers, as training would write it, for the tests of the plotter."""

import json
import math

import numpy as np

from clock_image_generator import ClockImageGenerator
from correlation_generator import CorrelationGenerator

SYSTEM = "Think first, then answer.\n<reasoning>\n…\n</reasoning>\n<answer>\n…\n</answer>"
TASKS = {
    "clock": ("mean_abs_error_minutes", "mean error", "min", True, 180.0, ("clock", "time_format", "strict_format")),
    "correlation": ("mean_abs_error", "mean error", "", True, 2 / 3, ("closeness", "value_format", "strict_format")),
    "arithmetic": ("accuracy", "accuracy", "%", False, None, ("correctness", "integer", "strict_format", "tags")),
    "gsm8k": ("accuracy", "accuracy", "%", False, None, ("correctness", "integer", "strict_format", "tags")),
}


def clock_time(seconds):
    seconds = int(seconds) % 43200
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def question(task, rng):
    """A question and its right answer."""
    if task == "clock":
        return "What time does this clock show? Answer as HH:MM:SS.", clock_time(rng.integers(43200))
    if task == "correlation":
        return "What is the correlation of the points in this plot?", f"{rng.uniform(-1, 1):.2f}"
    a, b, price = (int(n) for n in rng.integers(2, 60, 3))
    text = f"Mara buys {a} pens and {b} notebooks, all at ${price} apiece. How many dollars does she spend?"
    return text, str((a + b) * price)


def guess(task, answer, skill, rng):
    """An answer that gets better as skill goes from 0 to 1, or None for an unreadable one."""
    if rng.random() > 0.85 + 0.14 * skill:
        return None
    if task == "clock":
        hour, minute, second = (int(part) for part in answer.split(":"))
        off = rng.normal(0, 600) if rng.random() < skill else rng.uniform(0, 43200)
        return clock_time(hour * 3600 + minute * 60 + second + off)
    if task == "correlation":
        return round(float(np.clip(skill * float(answer) + rng.normal(0, 0.4 - 0.32 * skill), -1, 1)), 2)
    return float(answer) if rng.random() < 0.12 + 0.6 * skill else float(int(answer) + int(rng.integers(1, 20)))


def error(task, prediction, answer):
    if task == "clock":
        if prediction is None:
            return 360.0
        (h, m, s), (gh, gm, gs) = ([int(p) for p in t.split(":")] for t in (prediction, answer))
        off = abs((h - gh) * 3600 + (m - gm) * 60 + s - gs) % 43200
        return min(off, 43200 - off) / 60
    if task == "correlation":
        return 2.0 if prediction is None else abs(prediction - float(answer))
    return float(prediction != float(answer)) if prediction is not None else 1.0


def completion(task, answer, skill, rng, words=40):
    names = TASKS[task][5]
    prediction = guess(task, answer, skill, rng)
    shown = (
        "I cannot tell" if prediction is None else f"{prediction:g}" if isinstance(prediction, float) else prediction
    )
    thought = " ".join(rng.choice(["the", "short", "hand", "points", "so", "sum", "is", "about", "next"], words))
    text = f"<reasoning>\n{thought}\n</reasoning>\n<answer>\n{shown}\n</answer>"
    off = error(task, prediction, answer)
    first = {"clock": 3 - off / 60, "correlation": 1 - off}.get(task, 2.0 * (off == 0))
    rewards = {names[0]: round(first, 4), names[1]: 0.5 * (prediction is not None), **dict.fromkeys(names[2:], 0.5)}
    return {
        "text": text,
        "rewards": rewards,
        "reward": round(sum(rewards.values()), 4),
        "advantage": None,
        "length": words + 20,
        "truncated": bool(rng.random() < 0.05),
        "prediction": prediction,
    }


def make_group(task, folder, identity, skill, rng, generations, size, words):
    text, answer = question(task, rng)
    image = None
    if task in ("clock", "correlation"):
        image = f"images/{identity}.png"
        (folder / "images").mkdir(parents=True, exist_ok=True)
        if task == "clock":
            picture = ClockImageGenerator(size=size).generate(*(int(part) for part in answer.split(":")))
        else:
            picture = CorrelationGenerator(size=size).generate(float(answer), rng)
        picture.save(folder / image)
    completions = [completion(task, answer, skill, rng, words) for _ in range(generations)]
    if generations > 1:
        rewards = np.array([c["reward"] for c in completions])
        for c, advantage in zip(completions, (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4), strict=True):
            c["advantage"] = round(float(advantage), 4)
    return {
        "id": identity,
        "prompt": f"{SYSTEM}\n\n{text}",
        "image": image,
        "answer": answer,
        "completions": completions,
    }


def metrics_of(task, groups):
    rows = [(g["answer"], c) for g in groups for c in g["completions"]]
    errors = np.array([error(task, c["prediction"], answer) for answer, c in rows])
    unreadable = float(np.mean([c["prediction"] is None for _, c in rows]))
    if task == "clock":
        within = {f"within_{m}_minutes": float((errors <= m).mean()) for m in (1, 5, 10)}
        return {"mean_abs_error_minutes": errors.mean(), "median_abs_error_minutes": float(np.median(errors)), **within,
                "unreadable_fraction": unreadable}  # fmt: skip
    if task == "correlation":
        return {"mean_abs_error": float(errors.mean()), "unreadable_fraction": unreadable}
    right = float((errors == 0).mean())
    return {"accuracy": right, "accuracy_strict": max(0.0, right - 0.05), "format_fraction": 1 - unreadable}


def make_run(folder, task="clock", steps=60, eval_steps=20, eval_size=32, groups=2, generations=8, seed=0, size=56,
             words=40, pace=3.0, **flags):  # fmt: skip
    """Writes a run of `steps` steps into `folder`, with `flags` added to its flags, and returns the folder."""
    rng = np.random.default_rng(seed)
    metric, label, unit, lower, chance, names = TASKS[task]
    for name in ("eval_logs", "train_samples"):
        (folder / name).mkdir(parents=True)
    flags = {"model_path": "tiny", "dataset_name": task, "output_dir": str(folder), "learning_rate": 1e-4, "beta": 0.04,
             "seed": seed, "num_generations": generations, **flags}  # fmt: skip
    headline = {"metric": metric, "label": label, "unit": unit, "lower_is_better": lower, "chance": chance}
    config = {
        "flags": flags,
        "resolved": {"total_steps": steps, "device": "cpu", "dtype": "float32", "parameters": 1_234_567},
        "command": f"python main.py --model_path tiny --dataset_name {task} --output_dir {folder} --seed {seed}",
        "versions": {"python": "3.12.1", "torch": "2.15.0", "transformers": "5.23.0"},
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "hardware": {"device": "cpu", "cpu_count": 2, "memory_gb": 8.0},
        "started": "2026-01-02T03:04:05",
        "task": {"name": task, "modality": "text", "reward_names": list(names), "headline": headline,
                 "best_constant": {"clock": 180.0, "correlation": 0.5}.get(task)},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))

    lines = []
    for step in range(steps + 1):
        skill = 1 - math.exp(-pace * step / max(steps, 1))
        if step % eval_steps == 0 or step == steps:
            write_evaluation(folder, task, step, skill, eval_size, size, words, seed)
        if step == 0:
            continue
        asked = [make_group(task, folder / "train_samples", f"{task}-train-0-{step}-{i}", skill, rng, generations,
                            size, words) for i in range(groups)]  # fmt: skip
        (folder / f"train_samples/step_{step:06d}.json").write_text(json.dumps({"step": step, "groups": asked}))
        lines.append(json.dumps(train_record(task, step, steps, asked, rng)))
    (folder / "train_logs.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")
    return folder


def train_record(task, step, steps, groups, rng):
    completions = [c for g in groups for c in g["completions"]]
    progress = step / steps
    seconds = {"rollout": rng.uniform(0.5, 0.7), "reward": 0.01, "loss": rng.uniform(0.3, 0.4)}
    return {
        "step": step, "epoch": round(4 * progress, 4), "loss": rng.normal(0, 0.02), "grad_norm": rng.lognormal(0, 0.4),
        "reward": float(np.mean([c["reward"] for c in completions])), "reward_std": rng.uniform(0.3, 0.9),
        **{f"rewards/{name}": float(np.mean([c["rewards"][name] for c in completions])) for name in TASKS[task][5]},
        "kl": None if step == 3 else 0.4 * progress + rng.uniform(0, 0.05), "entropy": 1.2 - 0.8 * progress,
        "clip_fraction": rng.uniform(0, 0.02), "learning_rate": 1e-4 * min(1, step / (0.1 * steps)),
        "completion_length": rng.normal(60, 4), "truncated_fraction": rng.uniform(0, 0.1),
        "zero_std_fraction": rng.uniform(0, 0.3), "sampler_logp_diff": rng.uniform(0, 1e-6), "tokens": 960,
        "tokens_per_second": rng.normal(900, 50), **{f"seconds/{k}": v for k, v in seconds.items()},
        "seconds/total": sum(seconds.values()) + 0.02, "peak_memory_gb": 0.6, **metrics_of(task, groups),
    }  # fmt: skip


def write_evaluation(folder, task, step, skill, size_of_set, size, words, seed):
    groups = []
    for i in range(size_of_set):  # the same questions at every evaluation, with different answers
        group = make_group(task, folder / "eval_logs", f"{task}-test-0-{i}", skill, np.random.default_rng([999, i]), 1,
                           size, words)  # fmt: skip
        answer_rng = np.random.default_rng([seed, step, i])
        groups.append({**group, "completions": [completion(task, group["answer"], skill, answer_rng, words)]})
    rewards = [g["completions"][0]["reward"] for g in groups]
    metrics = {"step": step, "num_examples": size_of_set, "avg_reward": float(np.mean(rewards))}
    metrics |= {**metrics_of(task, groups), "completion_length": 60.0, "truncated_fraction": 0.03, "seconds": 2.5}
    if "accuracy" in metrics:
        metrics["accuracy_low"] = max(0.0, metrics["accuracy"] - 0.1)
        metrics["accuracy_high"] = min(1.0, metrics["accuracy"] + 0.1)
    for name, content in (("metrics", metrics), ("samples", {"step": step, "groups": groups})):
        (folder / f"eval_logs/{name}_{step:06d}.json").write_text(json.dumps(content))
