"""From token ids to streams, and from logits back to ids."""

from __future__ import annotations

from dsv4_core.contract.spec import Array, Ops, op


class EmbedOps(Ops):
    """Embedding and sampling."""

    @op(
        axes={"ids": "tokens", "weight": "vocab dim"},
        returns="tokens dim",
        dtypes={"ids": "int32", "weight": "weight", "return": "act"},
        judged="exact",
        reads={"weight": "min(1, tokens/vocab)"},
    )
    def embedding(self, ids: Array, weight: Array) -> Array:
        """Look up rows: ``y[t, d] = weight[ids[t], d]``, in the activation dtype.

        Ids outside ``0 .. vocab - 1`` give a row of zeros (a rank that holds part of the vocabulary
        relies on it).
        """
        raise NotImplementedError

    @op(
        axes={"logits": "tokens vocab", "uniform": "tokens"},
        returns="tokens",
        dtypes={"logits": "wide", "uniform": "float32", "return": "int32"},
        judged="discrete",
        work={"vector": "tokens*vocab"},
    )
    def sample(self, logits: Array, uniform: Array, *, temperature: float, top_p: float) -> Array:
        """Choose a token a row. ``temperature = 0``: the largest logit, the lower id on a tie.

        A row whose largest logit is no finite number (it holds a NaN or an infinity, or nothing but
        minus infinities) gives -1: there is nothing to choose by.

        Otherwise ``p = softmax(logits / temperature)``; sort descending (ties: lower id first),
        keep the shortest prefix whose sum reaches ``top_p``, and take the first token at which the
        running sum exceeds ``uniform[t]`` times the prefix's sum.
        """
        raise NotImplementedError
