"""dsv4's graph as a model of vLLM: vLLM schedules, samples and serves; dsv4 computes, on any of its
backends.

vLLM's blocks are dsv4's pages: its block tables say where a request's rows lie, so prefix caching
and preemption are vLLM's own. What a block holds is in arrays of the backend.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn
from vllm.distributed import get_tp_group
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, MultipleOf
from vllm.v1.kv_cache_interface import FullAttentionSpec

from dsv4_core.contract import registry
from dsv4_core.contract.dtypes import BFLOAT16
from dsv4_core.graph.model import Model
from dsv4_core.graph.pages import Pages
from dsv4_core.graph.replay import Replay
from dsv4_core.graph.step import Step
from dsv4_core.ranks.team import Team
from dsv4_vllm.ranks import team

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm.config import VllmConfig

    from dsv4_core.contract.spec import Array

LAYER = "model.layers.0.dsv4"
PROPOSER = "dsv4_vllm.proposer.MtpProposer"


class Rows(NamedTuple):
    """What a step runs: request i's tokens are ``starts[i] .. starts[i + 1]`` of the step and end
    at ``ends[i]`` of its own.

    ``tables`` [requests, blocks].
    """

    starts: np.ndarray
    ends: np.ndarray
    tables: np.ndarray


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
        return Rows(starts, m.seq_lens[:n].cpu().numpy().copy(), m.block_table_tensor[:n].cpu().numpy().copy())


class PagedBackend(AttentionBackend):
    """Attention as vLLM sees it: a builder of metadata, and blocks of any size."""

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
    def get_supported_kernel_block_sizes(spec: Any = None) -> list[MultipleOf]:
        del spec
        return [MultipleOf(1)]


class PagedLayer(nn.Module, AttentionLayerBase):
    """The one layer that vLLM knows of; its block is a page of all layers."""

    def __init__(self, config: VllmConfig) -> None:
        super().__init__()
        self.kv_cache = torch.tensor([])  # vLLM's own memory for the blocks, of which only the count is used
        self.page_bytes = 0
        config.compilation_config.static_forward_context[LAYER] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        return PagedBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> FullAttentionSpec:
        """One state a block, as large as a page."""
        size = vllm_config.cache_config.block_size
        return FullAttentionSpec(
            block_size=size,
            num_kv_heads=1,
            head_size=1,
            dtype=torch.uint8,
            tokens_per_state=size,
            state_content_bytes=self.page_bytes,
        )


def refuse(config: VllmConfig) -> None:
    """Raise ``ValueError`` for what is not supported, before weights load."""
    parallel, drafts = config.parallel_config, config.speculative_config
    drafter = drafts and (drafts.method, drafts.model if drafts.method == "custom_class" else None)
    wrong = {
        f"--speculative-config with method {drafter and drafter[0]!r}": (
            drafter not in (None, ("ngram", None), ("custom_class", PROPOSER)),
            f"take ngram, or the MTP block by {{'method': 'custom_class', 'model': '{PROPOSER}', 'num_speculative_tokens': 1}}",
        ),
        "--data-parallel-size": (parallel.data_parallel_size > 1, "run several servers behind a router"),
        "--nnodes": (parallel.nnodes > 1, "tensor-parallel ranks must be on one host"),
        "--enable-expert-parallel": (parallel.enable_expert_parallel, "leave it out"),
        "--decode-context-parallel-size": (parallel.decode_context_parallel_size > 1, "leave it out"),
        "--enable-lora": (config.lora_config is not None, "leave it out"),
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


class Ran(NamedTuple):
    """A rectangle that a step ran: which of the step's requests, and where their tokens stand among
    the step's [requests, tokens].
    """

    requests: list[int]
    step: Step
    at: np.ndarray


class Dsv4ForCausalLM(nn.Module):
    """``DeepseekV4ForCausalLM`` of vLLM, computed by dsv4. Hidden states are the streams [tokens,
    hc * hidden_size].
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Refuse what cannot be served; no weight is read yet."""
        super().__init__()
        del prefix
        refuse(vllm_config)
        self.layer = PagedLayer(vllm_config)
        self.path = Path(vllm_config.model_config.model)
        self.sequences = vllm_config.scheduler_config.max_num_seqs
        self.capacity = vllm_config.model_config.max_model_len
        self.page = vllm_config.cache_config.block_size
        self.drafts = vllm_config.num_speculative_tokens
        self.mtp = self.drafts > 0 and vllm_config.speculative_config.method == "custom_class"
        self.ranks = vllm_config.parallel_config.tensor_parallel_size
        self.backend = create_backend(vllm_config)
        hf = vllm_config.model_config.hf_config
        self.width = hf.hidden_size * hf.hc_mult
        self.streams_type = getattr(torch, self.backend.activation_dtype)
        self.pages: Pages | None = None
        self.ran: list[Ran] = []

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load dsv4's way, from the same directory; what vLLM read is left unread."""
        del weights
        self.team: Team = team(self.backend, get_tp_group()) if self.ranks > 1 else Team()
        source, parallel = self.team.share(self.team.open(self.path))
        self.graph = Model(source, self.backend, parallel=parallel, draft=self.mtp)
        self.layer.page_bytes = self._make_pages(1).nbytes
        return set()

    def _make_pages(self, count: int) -> Pages:
        return Pages(
            self.backend,
            self.graph.config,
            sequences=self.sequences,
            capacity=self.capacity,
            page=self.page,
            pages=count,
            rewindable=self.drafts,
        )

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
        """Run the scheduler's rows: requests with like many tokens together."""
        del positions, intermediate_tensors, inputs_embeds
        metadata = get_forward_context().attn_metadata
        out = torch.zeros((input_ids.shape[0], self.width), dtype=self.streams_type)
        if not isinstance(metadata, dict):  # vLLM's warm-up has no request
            return out
        rows: Rows = metadata[LAYER]
        pages = self._pages()
        ids, counts = input_ids.cpu().numpy(), np.diff(rows.starts)
        begins, self.ran = rows.ends - counts, []
        for count in np.unique(counts):
            group = np.flatnonzero(counts == count)
            pages.place(rows.tables[group], begins[group])
            at = rows.starts[group, None] + np.arange(count)
            step = Step(pages, ids[at], range(len(group)))
            few = count <= 1 + self.drafts
            h = self.replay.streams(step) if few else self.graph.forward(step)
            out[torch.from_numpy(at.reshape(-1))] = self._to_torch(h).reshape(-1, self.width)
            if self.mtp:
                self.ran.append(Ran(group.tolist(), step, at))
        self.out = out
        return out

    def _pages(self) -> Pages:
        """As many as vLLM has blocks: they are made when the first step runs."""
        if self.pages is None:
            self.pages = self._make_pages(len(self.layer.kv_cache))
            self.replay = Replay(self.graph, self.pages)
            said = f"{self.backend.describe()}, {self.backend.numerics}; {self.pages.pages} pages of {self.page} tokens"
            print(f"dsv4 serves: {said}, {self.pages.nbytes / 1e6:.1f} MB", flush=True)
        return self.pages

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits [tokens, vocab] in float32."""
        logits = self.graph.logits(self._from_torch(hidden_states))
        return torch.from_numpy(self.backend.to_numpy(logits).astype(np.float32))

    def _from_torch(self, hidden: torch.Tensor) -> Array:
        c = self.graph.config
        streams = hidden.reshape(-1, c.hc_mult, c.hidden_size).contiguous()
        host = streams.view(torch.int16).numpy().view(BFLOAT16) if streams.dtype == torch.bfloat16 else streams.numpy()
        return self.backend.from_numpy(host)

    def _to_torch(self, streams: Array) -> torch.Tensor:
        host = np.ascontiguousarray(self.backend.to_numpy(streams))
        return (
            torch.from_numpy(host.view(np.int16)).view(torch.bfloat16)
            if host.dtype == BFLOAT16
            else torch.from_numpy(host)
        )

    def mtp_drafts(self, known: list[np.ndarray]) -> list[list[int]]:
        """A token that the MTP block proposes after each of the last step's requests, which it must
        all see.

        ``known``: of each request, its ids up to the newest one. Where they do not yet say what
        follows the last fed token that stands, nothing is proposed.
        """
        drafts: list[list[int]] = [[] for _ in known]
        be = self.backend
        for requests, step, at in self.ran:
            following, ends, asked = np.zeros((step.batch, step.seq), np.int32), [], []
            for i, request in enumerate(requests):
                ids = known[request][int(step.starts[i]) + 1 :][: step.seq]
                following[i, : len(ids)] = ids
                if int(step.starts[i]) + 1 + len(ids) == len(known[request]):
                    ends.append(i * step.seq + len(ids) - 1)
                    asked.append(request)
            m = self.graph.mtp(self._from_torch(self.out[at.reshape(-1)]), be.from_numpy(following.reshape(-1)), step)
            if ends:
                logits = self.graph.logits(be.concat([m[end : end + 1] for end in ends], axis=0), mtp=True)
                greedy = be.sample(logits, be.from_numpy(np.zeros(len(ends), np.float32)), temperature=0.0, top_p=1.0)
                for request, token in zip(asked, be.to_numpy(greedy).tolist(), strict=True):
                    drafts[request] = [token] if token >= 0 else []
        return drafts
