"""Distil a DSpark drafter from a model's own words: one for the embedded model.

    python benchmarks/distil_drafter.py sample --out SAMPLES.npz [--rounds 3]
    python benchmarks/distil_drafter.py train SAMPLES.npz --out DIR [--minutes 25]

``sample`` lets the model ask itself questions at temperature 1 and answers each at several
temperatures; then it notes, for every token, the taps (the mean of the streams after each target
layer) and the row that the head reads, in native numerics. ``train`` fits one stage in PyTorch: the
divergence of the drafter's distributions from the model's own, given the true tokens before; the
confidence learns the chance that a draft drawn so is kept, the sum of min(P, Q). Weights are
rounded to FP8 and FP4 in the forward pass from the start. What is written holds ``mtp.*`` alone, in
the published layout.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, silu, softplus

import dsv4_core as dsv4
from dsv4_core.checkpoint.config import ModelConfig
from dsv4_core.checkpoint.create import header
from dsv4_core.checkpoint.layout import QUANTISED, TensorSpec, tensor_specs, unpacked
from dsv4_core.checkpoint.shards import BITS
from dsv4_core.contract.dtypes import BFLOAT16, quantise_weight
from dsv4_core.graph.cache import Cache
from dsv4_core.graph.dspark import mean_of_streams
from dsv4_core.graph.model import Model
from dsv4_core.graph.step import Step

BLOCK, RANK, NOISE, TARGETS, STAGES = 5, 64, 2, (3, 4, 5), 1
THINK_END = 6
LENGTH = 160  # tokens of a sample


def drafting(config: ModelConfig) -> ModelConfig:
    """The model's configuration with DSpark."""
    keys = {"dspark_block_size": BLOCK, "dspark_noise_token_id": NOISE, "dspark_markov_rank": RANK}
    ratios = (*config.compress_ratios[: config.num_hidden_layers], *(0 for _ in range(STAGES)))
    return replace(config, compress_ratios=ratios, dspark_target_layer_ids=TARGETS, **keys)


# samples


class Tapped(Model):
    """Notes the mean of the streams after the target layers."""

    noted: list[Any]

    def block(self, block: Any, h: Any, step: Any) -> Any:
        """One layer."""
        h = super().block(block, h, step)
        if block.index in TARGETS:
            be = self.backend
            self.noted.append(be.hc_head(h, *self.mean, norm_eps=1.0, eps=0.0))
        return h


def sample(out: Path, rounds: int) -> None:
    """Write ids [n, LENGTH] (-1: none), taps [n, LENGTH, targets * D] and the head's rows [n,
    LENGTH, D], float16.
    """
    session = dsv4.load(backend="torch")
    be, c = session.backend, session.config
    lines: list[list[int]] = []
    for turn in range(rounds):
        asked = [[0, 3]] * 192
        first = session.generate(asked, max_tokens=LENGTH - 2, temperature=1.0, seed=1000 + turn).run().tokens
        lines += [[0, 3, *line] for line in first]
        questions = [[0, 3, *line[: line.index(THINK_END) + 1]] for line in first if THINK_END in line[:40]]
        for temperature in (0.0, 0.6):
            room = LENGTH - max(map(len, questions))
            answers = session.generate(questions, max_tokens=room, temperature=temperature, seed=turn).run().tokens
            lines += [[*q, *a] for q, a in zip(questions, answers, strict=True)]
        print(f"round {turn}: {len(lines)} samples, {sum(map(len, lines))} tokens", flush=True)
    lines = [list(line) for line in dict.fromkeys(map(tuple, lines)) if len(line) > 24]
    ids = np.full((len(lines), LENGTH), -1, np.int64)
    for row, line in zip(ids, lines, strict=True):
        row[: len(line)] = line
    model = Tapped(session.checkpoint, be)
    model.mean = tuple(map(be.load, mean_of_streams(c.hc_mult, c.hidden_size)))
    taps, rows = [], []
    for at in range(0, len(ids), 32):
        part = np.maximum(ids[at : at + 32], 0)
        cache = Cache(be, c, len(part), LENGTH)
        model.noted = []
        h = model.forward(Step(cache, part))
        head = model.head
        with be.computing():
            x = be.hc_head(h, head.hc.fn, head.hc.scale, head.hc.base, norm_eps=c.rms_norm_eps, eps=c.hc_eps)
            x = be.rms_norm(x, head.norm, eps=c.rms_norm_eps)
        both = [
            np.asarray(be.to_numpy(be.concat(model.noted, axis=1)), np.float16),
            np.asarray(be.to_numpy(x), np.float16),
        ]
        taps.append(both[0].reshape(len(part), LENGTH, -1))
        rows.append(both[1].reshape(len(part), LENGTH, -1))
    np.savez(out, ids=ids, taps=np.concatenate(taps), rows=np.concatenate(rows))
    print(f"{len(ids)} samples, {int((ids >= 0).sum())} tokens", flush=True)


# training


def rounded(w: torch.Tensor, fmt: str) -> torch.Tensor:
    """Round a weight [..., out, in] to its format's grid, and let gradients through."""
    with torch.no_grad():
        if fmt == "e4m3":
            *lead, out, cols = w.shape
            blocks = w.reshape(*lead, out // 128, 128, cols // 128, 128)
            scale = torch.exp2(torch.ceil(torch.log2(blocks.abs().amax((-3, -1), keepdim=True).clamp(min=2e-38) / 448)))
            near = ((blocks / scale).to(torch.float8_e4m3fn).float() * scale).reshape(w.shape)
        else:
            groups = w.reshape(*w.shape[:-1], -1, 32)
            scale = torch.exp2(torch.ceil(torch.log2(groups.abs().amax(-1, keepdim=True).clamp(min=2e-38) / 6)))
            grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
            middle = (grid[1:] + grid[:-1]) / 2
            x = groups / scale
            near = (torch.copysign(grid[torch.bucketize(x.abs(), middle)], x) * scale).reshape(w.shape)
    return w + (near - w).detach()


def norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """RMS norm."""
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight


class Stage(torch.nn.Module):
    """One stage with everything that DSpark has: plain PyTorch, for gradients."""

    def __init__(self, checkpoint: Any, config: ModelConfig) -> None:
        """Begin with the MTP block, which has been trained to see two tokens ahead; it reads the
        last target layer.
        """
        super().__init__()
        self.c = c = config
        self.specs = {n: s for n, s in tensor_specs(config).items() if n.startswith("mtp.")}
        self.p = torch.nn.ParameterDict()
        draws = torch.Generator().manual_seed(0)
        D, V = c.hidden_size, c.vocab_size
        for name, spec in self.specs.items():
            if spec.dtype == "F8_E8M0" or ".experts." in name:
                continue
            if name in checkpoint and name.startswith("mtp.0."):
                whole = checkpoint.weight(name[:-7]) if name.endswith(".weight") else checkpoint.array(name)
                value = np.array(whole.dequantise() if hasattr(whole, "dequantise") else whole, np.float32)
            elif "main_proj" in name:
                value = np.concatenate([np.zeros((D, D)), 0.2 * np.eye(D), np.eye(D)], axis=1).astype(np.float32)
            elif "main_norm" in name:
                value = np.array(checkpoint.weight("mtp.0.attn_norm"), np.float32)
            else:
                deviation = 0.5 if name.endswith("markov_w1.weight") else 0.02
                value = (deviation * torch.randn(unpacked(spec), generator=draws)).numpy()
            self.p[name.replace(".", "/")] = torch.nn.Parameter(torch.from_numpy(value))
        for w in ("w1", "w2", "w3"):
            held = [checkpoint.weight(f"mtp.0.ffn.experts.{e}.{w}").dequantise() for e in range(c.n_routed_experts)]
            self.p[f"experts/{w}"] = torch.nn.Parameter(torch.from_numpy(np.stack(held)))
        self.embed = torch.from_numpy(np.array(checkpoint.weight("embed"), np.float32))
        self.head = torch.from_numpy(np.array(checkpoint.weight("head"), np.float32))
        self.freqs = torch.from_numpy(c.rope_frequencies(0))
        assert self.embed.shape == (V, D)

    def get(self, name: str) -> torch.Tensor:
        """A parameter as the model will have it: rounded where it is stored quantised."""
        spec = self.specs[full := f"mtp.0.{name}"]
        w = self.p[full.replace(".", "/")]
        return rounded(w, "e4m3") if spec.dtype == "F8_E4M3" else w

    def rope(self, x: torch.Tensor, position: torch.Tensor, sign: int = 1) -> torch.Tensor:
        """Rotate the last channels of x [..., d] by position [...]."""
        angle = position[..., None] * self.freqs
        r = self.c.qk_rope_head_dim
        still, turned = x[..., :-r], x[..., -r:].unflatten(-1, (-1, 2))
        even, odd, cos, sin = turned[..., 0], turned[..., 1], angle.cos(), sign * angle.sin()
        return torch.cat([still, torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)], -1)

    def row(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Key/value rows."""
        c = self.c
        return self.rope(
            norm(x @ self.get("attn.wkv.weight").T, self.get("attn.kv_norm.weight"), c.rms_norm_eps), position
        )

    def hyper(self, half: str, h: torch.Tensor, sub: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """A sub-layer between its hyper-connections; h [..., hc, D]."""
        c, hc = self.c, self.c.hc_mult
        x = h.flatten(-2)
        m = norm(x, None, c.rms_norm_eps) @ self.get(f"hc_{half}_fn").T
        scale, base = self.get(f"hc_{half}_scale"), self.get(f"hc_{half}_base")
        pre = torch.sigmoid(m[..., :hc] * scale[0] + base[:hc]) + c.hc_eps
        post = 2 * torch.sigmoid(m[..., hc : 2 * hc] * scale[1] + base[hc : 2 * hc])
        raw = (m[..., 2 * hc :] * scale[2] + base[2 * hc :]).unflatten(-1, (hc, hc))
        comb = raw.softmax(-1) + c.hc_eps
        comb = comb / (comb.sum(-2, keepdim=True) + c.hc_eps)
        for _ in range(c.hc_sinkhorn_iters - 1):
            comb = comb / (comb.sum(-1, keepdim=True) + c.hc_eps)
            comb = comb / (comb.sum(-2, keepdim=True) + c.hc_eps)
        x = norm((pre[..., None] * h).sum(-2), self.get(f"{half}_norm.weight"), c.rms_norm_eps)
        return post[..., None] * sub(x)[..., None, :] + comb.transpose(-1, -2) @ h

    def attention(
        self, x: torch.Tensor, context: torch.Tensor, seen: torch.Tensor, start: torch.Tensor
    ) -> torch.Tensor:
        """Rows x [N, B, D] at positions start.. ; context [N, W, d], of which ``seen`` [N, W] are
        there.
        """
        c, d = self.c, self.c.head_dim
        position = (start[:, None] + torch.arange(x.shape[1])).float()
        keys = torch.cat([context, self.row(x, position)], 1)
        q = norm(x @ self.get("attn.wq_a.weight").T, self.get("attn.q_norm.weight"), c.rms_norm_eps)
        q = norm((q @ self.get("attn.wq_b.weight").T).unflatten(-1, (-1, d)), None, c.rms_norm_eps)
        q = self.rope(q, position[..., None])
        s = torch.einsum("nbhd,nkd->nbhk", q, keys) * d**-0.5
        hidden = torch.cat([~seen, torch.zeros(len(x), x.shape[1], dtype=torch.bool)], 1)
        s = s.masked_fill(hidden[:, None, None], -torch.inf)
        sink = self.get("attn.attn_sink")[None, None, :, None].expand(*s.shape[:3], 1)
        o = torch.einsum("nbhk,nkd->nbhd", torch.cat([s, sink], -1).softmax(-1)[..., :-1], keys)
        o = self.rope(o, position[..., None], sign=-1).flatten(-2).unflatten(-1, (c.o_groups, -1))
        low = torch.einsum("nbgi,goi->nbgo", o, self.get("attn.wo_a.weight").unflatten(0, (c.o_groups, -1)))
        return low.flatten(-2) @ self.get("attn.wo_b.weight").T

    def experts(self, x: torch.Tensor) -> torch.Tensor:
        """All experts of all rows, of which the gate's are summed: the model is small."""
        c, limit = self.c, self.c.swiglu_limit
        score = torch.sqrt(softplus(x @ self.get("ffn.gate.weight").T))
        best = (score + self.get("ffn.gate.bias").detach()).topk(c.num_experts_per_tok).indices
        weight = score.gather(-1, best)
        weight = weight / weight.sum(-1, keepdim=True) * c.routed_scaling_factor
        weight = torch.zeros_like(score).scatter(-1, best, weight)
        w1, w2, w3 = (rounded(self.p[f"experts/{w}"], "e2m1") for w in ("w1", "w2", "w3"))
        g = (x @ w1.flatten(0, 1).T).unflatten(-1, (c.n_routed_experts, -1)).clamp(max=limit)
        u = (x @ w3.flatten(0, 1).T).unflatten(-1, (c.n_routed_experts, -1)).clamp(-limit, limit)
        routed = torch.einsum("nbei,eoi->nbo", silu(g) * u * weight[..., None], w2)
        at = "ffn.shared_experts"
        g, u = (x @ self.get(f"{at}.{w}.weight").T for w in ("w1", "w3"))
        return routed + (silu(g.clamp(max=limit)) * u.clamp(-limit, limit)) @ self.get(f"{at}.w2.weight").T

    def forward(
        self, ids: torch.Tensor, taps: torch.Tensor, sequence: torch.Tensor, p: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [N, B, V] and confidences before the sigmoid [N, B] of blocks that follow position
        ``p`` [N] of sequences ``sequence`` [N] of ids [S, L]; the tokens before each draft are the
        true ones.
        """
        c = self.c
        x = norm(taps @ self.get("main_proj.weight").T, self.get("main_norm.weight"), c.rms_norm_eps)
        rows = self.row(x, torch.arange(ids.shape[1]).float())
        at = p[:, None] + torch.arange(1 - c.sliding_window, 1)
        context, seen = rows[sequence[:, None], at.clamp(min=0)], at >= 0
        true = ids[sequence[:, None], (p[:, None] + 1 + torch.arange(BLOCK)).clamp(max=ids.shape[1] - 1)].clamp(min=0)
        block = torch.full((len(p), BLOCK), NOISE)
        block[:, 0] = true[:, 0]
        h = self.embed[block][:, :, None].expand(-1, -1, c.hc_mult, -1)
        h = self.hyper("attn", h, lambda x: self.attention(x, context, seen, p + 1))
        h = self.hyper("ffn", h, self.experts)
        m = norm(h.flatten(-2), None, c.rms_norm_eps) @ self.get("hc_head_fn").T
        pre = torch.sigmoid(m * self.get("hc_head_scale") + self.get("hc_head_base")) + c.hc_eps
        g = (pre[..., None] * h).sum(-2)
        e = self.get("markov_head.markov_w1.weight")[true]
        logits = norm(g, self.get("norm.weight"), c.rms_norm_eps) @ self.head.T
        logits = logits + e @ self.get("markov_head.markov_w2.weight").T
        return logits, (torch.cat([g, e], -1) @ self.get("confidence_head.proj.weight").T)[..., 0]


def train(samples: Path, out: Path, minutes: float, per_step: int = 12) -> None:
    """Fit, print how a held-out tenth fares, and write the drafter."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("medium")
    checkpoint = dsv4.load(backend="reference", lazy=True).checkpoint
    config = drafting(checkpoint.config)
    stage = Stage(checkpoint, config)
    held = np.load(samples)
    ids, taps, rows = (torch.from_numpy(held[key]) for key in ("ids", "taps", "rows"))
    order = torch.randperm(len(ids))
    test, rest = order[: len(ids) // 10], order[len(ids) // 10 :]
    fast = [p for name, p in stage.p.items() if "markov" in name or "main" in name or "confidence" in name]
    slow = [p for name, p in stage.p.items() if not any(part in name for part in ("markov", "main", "confidence"))]
    adam = torch.optim.AdamW(
        [{"params": slow, "lr": 1e-3}, {"params": fast, "lr": 4e-3}], weight_decay=0.01, betas=(0.9, 0.98)
    )
    rates = [group["lr"] for group in adam.param_groups]

    def judged(picked: torch.Tensor, blocks: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss, mean chance that a draft is kept [B], mean of leading drafts that are the model's
        first choice.
        """
        own = ids[picked]
        lengths = (own >= 0).sum(1)
        sequence = torch.arange(len(picked)).repeat_interleave(blocks)
        p = (torch.rand(len(sequence)) * (lengths[sequence] - 2)).long()
        logits, sure = stage(own, taps[picked].float(), sequence, p)
        at = p[:, None] + 1 + torch.arange(BLOCK)
        there = (own[sequence[:, None], at.clamp(max=LENGTH - 1)] >= 0) & (at < LENGTH)
        with torch.no_grad():
            wanted = (rows[picked][sequence[:, None], at.clamp(max=LENGTH - 1)].float() @ stage.head.T).log_softmax(-1)
        found = logits.log_softmax(-1)
        apart = (wanted.exp() * (wanted - found)).sum(-1)
        keeps = torch.minimum(wanted.exp(), found.detach().exp()).sum(-1).clamp(0, 1)
        weight = there * 0.85 ** torch.arange(BLOCK)
        loss = (weight * apart).sum() / weight.sum()
        loss = (
            loss + 0.1 * (weight * binary_cross_entropy_with_logits(sure, keeps, reduction="none")).sum() / weight.sum()
        )
        right = ((wanted.argmax(-1) == found.argmax(-1)) & there).cumprod(1).sum(1).float()[there.all(1)].mean()
        return loss, (keeps * there).sum(0) / there.sum(0), right

    began, step, told = time.monotonic(), 0, 0.0
    while (done := (time.monotonic() - began) / (60 * minutes)) < 1:
        for group, rate in zip(adam.param_groups, rates, strict=True):
            group["lr"] = rate * min(1, step / 30, max(0.02, 0.5 * (1 + math.cos(math.pi * done))))
        loss, keeps, right = judged(rest[torch.randint(len(rest), (per_step,))], 24)
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(stage.parameters(), 1.0)
        adam.step()
        step += 1
        if time.monotonic() - told > 60:
            told = time.monotonic()
            with torch.no_grad():
                loss, keeps, right = judged(test, 4)
            kept = " ".join(f"{x:.2f}" for x in keeps)
            print(
                f"{done:.0%} step {step}: held out: loss {loss:.3f}, kept {kept}, greedy drafts {right:.2f}", flush=True
            )
            write(stage, out)
    with torch.no_grad():
        loss, keeps, right = judged(test, 16)
    print(f"end, step {step}: held out: loss {loss:.3f}, kept {keeps.tolist()}, greedy drafts {right:.2f}", flush=True)
    write(stage, out)


def write(stage: Stage, out: Path) -> None:
    """Write config.json and the tensors under mtp. in the published layout."""
    out.mkdir(parents=True, exist_ok=True)
    made: dict[str, tuple[TensorSpec, bytes]] = {}
    for name, spec in stage.specs.items():
        if spec.dtype == "F8_E8M0":
            continue
        parts = name.split(".")
        with torch.no_grad():
            value = (
                stage.p[f"experts/{parts[5]}"][int(parts[4])]
                if ".experts." in name
                else stage.p[name.replace(".", "/")]
            )
        array = value.detach().numpy()
        if fmt := QUANTISED.get(spec.dtype):
            scaled = quantise_weight(array, fmt)
            scale = stage.specs[f"{name[:-7]}.scale"]
            made[name], made[scale.name] = (spec, scaled.data.tobytes()), (scale, scaled.scale.tobytes())
        elif array.ndim > 1:  # in BF16 where F32 is published, too: half the bytes, and read without loss
            made[name] = (spec._replace(dtype="BF16"), array.astype(BFLOAT16).tobytes())
        else:
            made[name] = (spec, array.astype(BFLOAT16 if spec.dtype == "BF16" else np.float32).tobytes())
    ordered = sorted(made.values(), key=lambda item: -BITS[item[0].dtype])
    with (out / "model.safetensors").open("wb") as file:
        file.write(header([spec for spec, _ in ordered]))
        file.writelines(data for _, data in ordered)
    (out / "config.json").write_text(stage.c.to_json())


def main() -> None:
    """Run a part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    first = parts.add_parser("sample")
    first.add_argument("--rounds", type=int, default=3)
    second = parts.add_parser("train")
    second.add_argument("samples", type=Path)
    second.add_argument("--minutes", type=float, default=25)
    for part in (first, second):
        part.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.part == "sample":
        sample(args.out, args.rounds)
    else:
        train(args.samples, args.out, args.minutes)


if __name__ == "__main__":
    main()
