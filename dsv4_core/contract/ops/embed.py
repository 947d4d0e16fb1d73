"""From token ids to streams, and from logits back to ids."""

from __future__ import annotations

from dsv4_core.contract import choosing
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

    @op(
        axes={
            "logits": "tokens vocab",
            "uniform": "tokens",
            "temperature": "tokens",
            "top_p": "tokens",
            "top_k": "tokens",
            "min_p": "tokens",
            "ids": "tokens changed",
            "added": "tokens changed",
            "allowed": "tokens words ?",
        },
        returns=("tokens", "tokens", "tokens likely", "tokens likely"),
        dtypes={
            "logits": "wide",
            "uniform": "float32",
            "temperature": "float32",
            "top_p": "float32",
            "top_k": "int32",
            "min_p": "float32",
            "ids": "int32",
            "added": "float32",
            "allowed": "int32",
            "return.0": "int32",
            "return.1": "wide",
            "return.2": "int32",
            "return.3": "wide",
        },
        judged="discrete",
        fused=True,
        work={"vector": "4*tokens*vocab"},
    )
    def sample_each(
        self,
        logits: Array,
        uniform: Array,
        temperature: Array,
        top_p: Array,
        top_k: Array,
        min_p: Array,
        ids: Array,
        added: Array,
        allowed: Array | None,
        *,
        likely: int,
    ) -> tuple[Array, Array, Array, Array]:
        """Choose a token a row, each row by its own wishes; tell its log-probability, and the
        ``likely`` most likely ids with theirs.

        ``x = logits``; ``x[t, ids[t, k]] += added[t, k]``, rounded to the wide dtype (an id of -1:
        nothing; a row names no id twice); minus infinity where bit ``v % 32`` of ``allowed[t, v //
        32]`` is 0 (``words`` is ``ceil(vocab / 32)``; None: all may be said). ``temperature[t] =
        0``: the largest ``x``, the lower id on a tie. Otherwise sort ``x`` descending (ties: lower
        id first) and keep its first ``top_k[t]`` (0: all); ``p = softmax(x / temperature)`` of
        those; keep the shortest prefix whose sum reaches ``top_p[t]``, and of it what has at least
        ``min_p[t]`` of the largest ``p``; take the first token at which the running sum exceeds
        ``uniform[t]`` times the sum of what is left.

        Log-probabilities are ``log_softmax(logits)``, as given; the likely ids are the largest
        logits, descending, the lower id first on a tie. A row whose largest logit, as given or as
        ``x``, is no finite number gives -1 for each id and NaN for each log-probability.

        The default chooses on the host: what a device has no way for is copied there.
        """
        host, wide = self.to_numpy, self.wide_dtype
        token, logprob, most, logprobs = choosing.sample_each(
            host(logits),
            host(uniform),
            host(temperature),
            host(top_p),
            host(top_k),
            host(min_p),
            host(ids),
            host(added),
            None if allowed is None else host(allowed),
            likely=likely,
        )
        return (
            self.from_numpy(token),
            self.from_numpy(logprob.astype(wide)),
            self.from_numpy(most),
            self.from_numpy(logprobs.astype(wide)),
        )
