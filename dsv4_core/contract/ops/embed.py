"""From token ids to streams, and from logits back to ids."""

from __future__ import annotations

from dsv4_core.contract.spec import Array, Case, Ops, op


def _embedding_cases() -> tuple[Case, ...]:
    base = Case("small", {"tokens": 5, "vocab": 64, "dim": 128}, tier="smoke")
    return (
        base,
        *base.odd(),
        base.but("ids_outside", "smoke", data="ids_outside"),
        base.but("views", views=True),
        base.but("float32", dtypes={"weight": "float32"}),
        base.but("flash", tokens=7, vocab=2048, dim=4096),
        base.but("pro", "full", tokens=7, vocab=2048, dim=7168),
    )


def _sample_cases() -> tuple[Case, ...]:
    base = Case("greedy", {"tokens": 5, "vocab": 512}, {"temperature": 0.0, "top_p": 1.0}, tier="smoke")
    return (
        base,
        base.but("greedy_ties", "smoke", data="ties"),
        base.but("warm", "smoke", temperature=0.7, top_p=0.9),
        base.but("top_p=0", temperature=1.0, top_p=0.0),
        base.but("warm_ties", data="ties", temperature=1.0, top_p=0.5),
        *base.odd(sizes=(0, 1, 17)),
        base.but("views", views=True, temperature=0.7),
        base.but("flash", vocab=129280, temperature=0.7, top_p=0.95),
    )


class EmbedOps(Ops):
    """Embedding and sampling."""

    @op(
        axes={"ids": "tokens", "weight": "vocab dim"},
        returns="tokens dim",
        dtypes={"ids": "int32", "weight": "weight", "return": "act"},
        judged="exact",
        reads={"weight": "min(1, tokens/vocab)"},
        cases=_embedding_cases,
    )
    def embedding(self, ids: Array, weight: Array) -> Array:
        """Look up rows: ``y[t, d] = weight[ids[t], d]``, in the activation dtype.

        Ids outside ``0 .. vocab - 1`` give a row of zeros (a rank that holds part of the vocabulary relies on it).
        """
        raise NotImplementedError

    @op(
        axes={"logits": "tokens vocab", "uniform": "tokens"},
        returns="tokens",
        dtypes={"logits": "wide", "uniform": "float32", "return": "int32"},
        judged="discrete",
        work={"vector": "tokens*vocab"},
        cases=_sample_cases,
    )
    def sample(self, logits: Array, uniform: Array, *, temperature: float, top_p: float) -> Array:
        """Choose a token a row. ``temperature = 0``: the largest logit, the lower id on a tie.

        Otherwise ``p = softmax(logits / temperature)``; sort descending (ties: lower id first), keep the shortest
        prefix whose sum reaches ``top_p``, and take the first token at which the running sum exceeds ``uniform[t]``
        times the prefix's sum.
        """
        raise NotImplementedError
