"""dsv4's graph as a model of vLLM: vLLM schedules, samples and serves; dsv4 computes, on any of its
backends.

The slot form. vLLM counts blocks and decides who runs; rows are kept in a cache of dsv4's own, one
slot a request. A request is known by its first block, which no other running request has as long as
prefixes are not shared: prefix caching is therefore refused. A request that was preempted comes
again from its first token.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder
from vllm.v1.kv_cache_interface import FullAttentionSpec

from dsv4_core.checkpoint.weights import Checkpoint
from dsv4_core.contract import registry
from dsv4_core.contract.dtypes import numpy_dtype
from dsv4_core.graph.cache import Cache
from dsv4_core.graph.model import Model
from dsv4_core.graph.step import Step

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm.config import VllmConfig

LAYER = "model.layers.0.dsv4"
BLOCK_SIZES = [16, 32, 64, 128]


class Rows(NamedTuple):
    """What a step runs: request i's tokens are ``starts[i] .. starts[i + 1]`` of the step and end
    at ``ends[i]`` of its own.

    ``names[i]``: its first block.
    """

    starts: np.ndarray
    ends: np.ndarray
    names: np.ndarray


class RowsBuilder(AttentionMetadataBuilder):
    """Makes ``Rows`` of what vLLM's scheduler chose."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Rows:
        """Copy the few numbers that a step needs to the host."""
        del common_prefix_len, fast_build
        m = common_attn_metadata
        n = m.num_reqs
        starts = m.query_start_loc_cpu[: n + 1].numpy().copy()
        return Rows(starts, m.seq_lens[:n].cpu().numpy().copy(), m.block_table_tensor[:n, 0].cpu().numpy().copy())


class CountedBackend(AttentionBackend):
    """Attention as vLLM sees it: a builder of metadata, and blocks that are counted but hold
    nothing.
    """

    @staticmethod
    def get_name() -> str:
        return "DSV4"

    @staticmethod
    def get_impl_cls() -> type:
        raise NotImplementedError("dsv4's graph attends itself")

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]:
        return RowsBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(spec: Any = None) -> list[int]:
        del spec
        return BLOCK_SIZES

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        del cache_dtype_str
        return (2, num_blocks, num_kv_heads, block_size, head_size)


class CountedLayer(nn.Module, AttentionLayerBase):
    """The one layer that vLLM knows of: its blocks admit requests, and name them."""

    def __init__(self, config: VllmConfig) -> None:
        super().__init__()
        self.kv_cache = torch.tensor([])
        config.compilation_config.static_forward_context[LAYER] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        return CountedBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> FullAttentionSpec:
        size = vllm_config.cache_config.block_size
        return FullAttentionSpec(block_size=size, num_kv_heads=1, head_size=32, dtype=torch.bfloat16)


class Slots:
    """Which slot of the cache belongs to which request, by its first block."""

    def __init__(self, count: int) -> None:
        self.of: dict[int, int] = {}
        self.last_step = np.zeros(count, np.int64)
        self.steps = 0

    def find(self, name: int, begin: int) -> int:
        """Slot of the request whose tokens from ``begin`` on are run now.

        From 0 on it is a new one, or one that was preempted, and gets the slot that was idle the
        longest. Raises ``RuntimeError`` for a request that has not been seen from its first token.
        """
        if begin == 0:
            self.of.pop(name, None)
            idle = np.array(
                sorted(set(range(len(self.last_step))) - set(self.of.values()), key=self.last_step.__getitem__)
            )
            slot = int(idle[0]) if len(idle) else int(self.last_step.argmin())
            self.of = {other: taken for other, taken in self.of.items() if taken != slot} | {name: slot}
        elif name not in self.of:
            raise RuntimeError(
                f"dsv4-vllm: a request begins at token {begin}, whose rows dsv4 has not seen; serve with prefix caching off"
            )
        slot = self.of[name]
        self.last_step[slot] = self.steps
        return slot


def refuse(config: VllmConfig) -> None:
    """Raise ``ValueError`` for what the slot form cannot do, before weights load."""
    parallel = config.parallel_config
    wrong = {
        "--enable-prefix-caching": (config.cache_config.enable_prefix_caching, "add --no-enable-prefix-caching"),
        "--speculative-config": (config.speculative_config is not None, "leave it out"),
        "--tensor-parallel-size": (parallel.tensor_parallel_size > 1, "leave it out; `dsv4 serve` runs ranks"),
        "--pipeline-parallel-size": (parallel.pipeline_parallel_size > 1, "leave it out"),
    }
    for option, (given, advice) in wrong.items():
        if given:
            raise ValueError(f"dsv4-vllm: {option} is not supported with dsv4's graph; {advice}")


def create_backend(config: VllmConfig) -> Any:
    """The backend that ``--additional-config '{"dsv4": {"backend": ..., "numerics": ..., "options":
    {...}}}'`` names, else the one of ``DSV4_BACKEND`` and ``DSV4_NUMERICS``, else what is here.
    """
    given = (config.additional_config or {}).get("dsv4", {})
    if unknown := sorted(given.keys() - {"backend", "numerics", "options"}):
        raise ValueError(
            f"dsv4-vllm: additional_config.dsv4 has no key {unknown[0]!r}; keys: backend, numerics, options"
        )
    name = given.get("backend") or registry.choose(os.environ.get("DSV4_BACKEND")).name
    numerics = given.get("numerics") or os.environ.get("DSV4_NUMERICS", "native")
    return registry.create(name, numerics=numerics, **given.get("options", {}))


class Dsv4ForCausalLM(nn.Module):
    """``DeepseekV4ForCausalLM`` of vLLM, computed by dsv4. Hidden states are the streams [tokens,
    hc * hidden_size].
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Refuse what cannot be served; no weight is read yet."""
        super().__init__()
        del prefix
        refuse(vllm_config)
        self.layer = CountedLayer(vllm_config)
        self.path = Path(vllm_config.model_config.model)
        self.capacity = vllm_config.model_config.max_model_len
        self.slots = Slots(vllm_config.scheduler_config.max_num_seqs + 1)
        self.backend = create_backend(vllm_config)
        hf = vllm_config.model_config.hf_config
        self.width = hf.hidden_size * hf.hc_mult
        self.streams_type = getattr(torch, self.backend.activation_dtype)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load dsv4's way, from the same directory; what vLLM read is left unread."""
        del weights
        checkpoint = Checkpoint(self.path)
        self.graph = Model(checkpoint, self.backend)
        self.cache = Cache(self.backend, checkpoint.config, len(self.slots.last_step), self.capacity)
        said = f"{self.backend.describe()}, {self.backend.numerics}; {self.cache.sequences} slots of {self.capacity} tokens"
        print(f"dsv4 serves: {said}, {self.cache.nbytes / 1e6:.1f} MB of cache", flush=True)
        return set()

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Asked for by vLLM in its warm-up; the graph embeds itself."""
        return torch.zeros((input_ids.shape[0], self.width), dtype=self.streams_type)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Any = None,
    ) -> torch.Tensor:
        """Run the scheduler's rows: requests with one token together, others one after another."""
        del positions, intermediate_tensors, inputs_embeds
        metadata = get_forward_context().attn_metadata
        out = torch.zeros((input_ids.shape[0], self.width), dtype=self.streams_type)
        if not isinstance(metadata, dict):  # vLLM's warm-up has no request
            return out
        rows: Rows = metadata[LAYER]
        ids = input_ids.cpu().numpy()
        counts = np.diff(rows.starts)
        begins = rows.ends - counts
        self.slots.steps += 1
        slots = [self.slots.find(int(name), int(begin)) for name, begin in zip(rows.names, begins, strict=True)]
        single = [i for i in range(len(slots)) if counts[i] == 1]
        for group in [single] * bool(single) + [[i] for i in range(len(slots)) if counts[i] > 1]:
            for i in group:
                if self.cache.lengths[slots[i]] != begins[i]:
                    self.cache.rewind(slots[i], int(begins[i]))
            step = Step(
                self.cache,
                np.stack([ids[rows.starts[i] : rows.starts[i + 1]] for i in group]),
                [slots[i] for i in group],
            )
            h = self.backend.to_numpy(self.graph.forward(step))
            self.cache.advance(step.sequences, step.ends)
            streams = torch.from_numpy(h.astype(np.float32)).to(self.streams_type).reshape(len(group), -1, self.width)
            for place, i in enumerate(group):
                out[rows.starts[i] : rows.starts[i + 1]] = streams[place, : counts[i]]
        return out

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits [tokens, vocab] in float32."""
        shape = (hidden_states.shape[0], self.graph.config.hc_mult, self.graph.config.hidden_size)
        host = (
            hidden_states.reshape(shape)
            .to(torch.float64 if self.backend.numerics == "float64" else torch.float32)
            .numpy()
        )
        h = self.backend.from_numpy(host.astype(numpy_dtype(self.backend.activation_dtype)))
        return torch.from_numpy(self.backend.to_numpy(self.graph.logits(h)).astype(np.float32))
