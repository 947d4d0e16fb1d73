"""Embedding and sampling."""

from __future__ import annotations

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
