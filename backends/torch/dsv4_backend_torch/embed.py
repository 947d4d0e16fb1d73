"""Embedding and sampling."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dsv4_backend_torch.numeric import Numeric
from dsv4_core.contract.ops.embed import EmbedOps


class TorchEmbed(Numeric, EmbedOps):
    """Contracts of ``ops/embed.py``."""

    def embedding(self, ids: Tensor, weight: Tensor) -> Tensor:
        if self.compiled and (few := self.compiled.embedding(ids, weight, self.act_type)) is not None:
            return few
        inside = (ids >= 0) & (ids < weight.shape[0])
        rows = weight.index_select(0, torch.where(inside, ids, 0))
        return self.rounded(torch.where(inside[:, None], rows, torch.zeros((), dtype=rows.dtype, device=rows.device)))

    def sample(self, logits: Tensor, uniform: Tensor, *, temperature: float, top_p: float) -> Tensor:
        if temperature == 0 and self.compiled:  # one pass, and no threads to wait for
            rows = logits.numpy()
            best = rows.argmax(-1)
            finite = np.isfinite(rows[np.arange(len(rows)), best])
            return torch.from_numpy(np.where(finite, best, -1).astype(np.int32))
        largest = logits.amax(-1, keepdim=True)
        sound = (largest - largest == 0)[:, 0]  # finite
        if temperature == 0:
            vocab = logits.shape[1]
            ids = torch.arange(
                vocab, dtype=torch.int32, device=logits.device
            )  # argmax does not promise the lowest of equals
            first = torch.where(logits == largest, ids, vocab - 1).amin(-1)
            return torch.where(sound, first, -1)
        scaled = logits / temperature
        p = (scaled - scaled.amax(-1, keepdim=True)).exp()
        p, order = p.sort(dim=-1, descending=True, stable=True)
        running = p.cumsum(-1)
        running = running / running[:, -1:]
        kept = (
            (running < top_p).sum(-1, keepdim=True).clamp(max=running.shape[1] - 1)
        )  # index of the last token of the shortest prefix
        goal = uniform[:, None] * running.gather(-1, kept)
        chosen = torch.minimum((running <= goal).sum(-1, keepdim=True), kept)
        return torch.where(sound, order.gather(-1, chosen.clamp(min=0))[:, 0].to(torch.int32), -1)

    def sample_each(
        self,
        logits: Tensor,
        uniform: Tensor,
        temperature: Tensor,
        top_p: Tensor,
        top_k: Tensor,
        min_p: Tensor,
        ids: Tensor,
        added: Tensor,
        allowed: Tensor | None,
        *,
        likely: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tokens, vocab = logits.shape
        x = logits
        if ids.shape[1]:
            named = ids >= 0
            x = x.scatter_add(1, torch.where(named, ids, 0).long(), torch.where(named, added, 0.0).to(x.dtype))
        if allowed is not None:
            bit = torch.arange(32, dtype=torch.int32, device=x.device)
            may = (allowed[:, :, None] >> bit & 1).reshape(tokens, 32 * allowed.shape[1])[:, :vocab]
            x = torch.where(may == 1, x, -torch.inf)
        largest = logits.amax(-1), x.amax(-1)
        sound = torch.stack([each - each == 0 for each in largest]).all(0)  # finite
        values, order = x.sort(dim=-1, descending=True, stable=True)
        warm = torch.where(temperature > 0, temperature, 1.0)[:, None]
        p = ((values - values[:, :1]) / warm).exp()
        count = torch.where(top_k > 0, top_k, vocab).clamp(max=vocab)[:, None]
        p = torch.where(torch.arange(vocab, device=x.device) < count, p, 0.0)
        running = p.cumsum(-1)
        prefix = (running < top_p[:, None] * running[:, -1:]).sum(-1, keepdim=True) + 1
        kept = torch.minimum(torch.minimum(prefix, count), (p >= min_p[:, None]).sum(-1, keepdim=True)).clamp(min=1) - 1
        goal = uniform[:, None] * running.gather(-1, kept)
        place = torch.minimum((running <= goal).sum(-1, keepdim=True), kept)
        place = torch.where(temperature[:, None] > 0, place, 0)
        token = torch.where(sound, order.gather(-1, place)[:, 0], -1)
        told = torch.where(sound[:, None], logits.log_softmax(-1), torch.nan)
        most = order[:, :0]
        if likely:
            most = logits.sort(dim=-1, descending=True, stable=True)[1][:, :likely]
        return (
            token.to(torch.int32),
            told.gather(-1, token.clamp(min=0)[:, None])[:, 0],
            torch.where(sound[:, None], most, -1).to(torch.int32),
            told.gather(-1, most),
        )
