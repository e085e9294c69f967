"""A second implementation of a GRPO update: whole padded rows, full logits, one formula per objective. Slow, short, and
independent of the project's own forward passes and losses."""

import torch
from small_models import plain_inputs


class PlainRows:
    """Each row is a prompt and its completion, padded on the right; each row has its own copy of the pictures."""

    def __init__(self, llm, rollout, examples):
        prompts = [plain_inputs(llm, examples[i // rollout.num_generations]) for i in range(len(rollout.texts))]
        self.starts = [one["input_ids"].shape[1] for one in prompts]
        masked = zip(rollout.completion_ids, rollout.completion_mask, strict=True)
        self.completions = [ids[mask] for ids, mask in masked]
        rows = [torch.cat([one["input_ids"][0], ids]) for one, ids in zip(prompts, self.completions, strict=True)]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        self.inputs = {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}
        if llm.is_vision:
            self.inputs["mm_token_type_ids"] = (ids == llm.model.config.image_token_id).int()
            shown = [one for one in prompts if "pixel_values" in one]
            for name in ("pixel_values", "image_grid_thw") if shown else ():
                self.inputs[name] = torch.cat([one[name] for one in shown])
        self.excluded = list(llm.excluded_token_ids)

    def distributions(self, model, temperature):
        """For each row the log-softmax (T, V) of its completion tokens."""
        logits = model(**self.inputs).logits / temperature
        logits[..., self.excluded] = -torch.inf
        logps = logits.log_softmax(-1)
        pairs = zip(self.starts, self.completions, strict=True)
        return [logps[i, start - 1 : start - 1 + len(ids)] for i, (start, ids) in enumerate(pairs)]

    def logps(self, model, temperature):
        """For each row the log-probabilities (T,) of its completion tokens."""
        rows = self.distributions(model, temperature)
        return [row.gather(1, ids[:, None])[:, 0] for row, ids in zip(rows, self.completions, strict=True)]

    def entropy(self, model, temperature):
        """The mean over all completion tokens."""
        rows = torch.cat(self.distributions(model, temperature))
        return -(rows.exp() * rows.nan_to_num(neginf=0.0)).sum(-1).mean().item()


def plain_loss(name, new, old, ref, advantages, longest):
    """The loss of a preset, one completion at a time. new, old, ref: for each the log-probabilities of its tokens."""
    total, tokens = 0.0, sum(map(len, new))
    for p, o, r, a in zip(new, old, ref, advantages, strict=True):
        ratio, s = (p - o).exp(), (p - o).mean().exp()
        kl = 0.04 * ((r - p).exp() - (r - p) - 1)
        if name == "grpo":
            gain = (torch.min(ratio * a, ratio.clip(0.8, 1.2) * a) - kl).mean() / len(new)
        elif name == "bnpo":
            gain = (torch.min(ratio * a, ratio.clip(0.8, 1.2) * a) - kl).sum() / tokens
        elif name == "dr_grpo":
            gain = torch.min(ratio * a, ratio.clip(0.8, 1.2) * a).sum() / (len(new) * longest)
        elif name == "dapo":
            gain = torch.min(ratio * a, ratio.clip(0.8, 1.28) * a).sum() / tokens
        elif name == "gspo":
            gain = torch.min(s * a, s.clip(0.9997, 1.0004) * a) / len(new)
        elif name == "cispo":
            gain = (ratio.clip(max=1.28).detach() * a * p).sum() / tokens
        total = total - gain
    return total


def compute_in_float64(monkeypatch):
    """Make float64 models compute in float64 throughout, so that two implementations agree to many digits: transformers
    computes norms and the vision tower's rotary positions in float32 for every dtype of the weights."""
    import transformers.models as families

    def norm(self, x):
        return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)

    def rotate(query, key, cos, sin):
        def turn(x):
            first, second = x.chunk(2, -1)
            return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

        return turn(query), turn(key)

    for family in ("llama", "qwen2", "qwen3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        code = getattr(getattr(families, family), f"modeling_{family}")
        for name in vars(code):
            if name.endswith("RMSNorm"):
                monkeypatch.setattr(getattr(code, name), "forward", norm)
        if hasattr(code, "apply_rotary_pos_emb_vision"):
            monkeypatch.setattr(code, "apply_rotary_pos_emb_vision", rotate)
