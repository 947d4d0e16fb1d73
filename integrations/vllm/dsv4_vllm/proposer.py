"""The checkpoint's MTP block as a proposer of vLLM's (``method: custom_class``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from vllm.config import VllmConfig

    from dsv4_vllm.model import Dsv4ForCausalLM


class MtpProposer:
    """One token a step; it changes how fast tokens come, not which."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        """Raise ``ValueError`` for more tokens than the block proposes."""
        wanted = vllm_config.num_speculative_tokens
        if wanted != 1:
            raise ValueError(f"dsv4-vllm: num_speculative_tokens = {wanted}; the MTP block proposes 1 a step")

    def load_model(self, model: Dsv4ForCausalLM) -> None:
        """Take the model, which holds the block; raise ``ValueError`` where its checkpoint has
        none.
        """
        if model.graph.mtp_block is None:
            raise ValueError(f"dsv4-vllm: {model.path} has no MTP block; leave --speculative-config out, or take ngram")
        self.model = model

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Ids of each request of the step that was just sampled; none where it is still reading its
        prompt.
        """
        del slot_mappings
        known = [token_ids_cpu[i, : num_tokens_no_spec[i]] for i in range(len(sampled_token_ids))]
        drafts = self.model.mtp_drafts(known)
        return [draft if chosen else [] for draft, chosen in zip(drafts, sampled_token_ids, strict=True)]
