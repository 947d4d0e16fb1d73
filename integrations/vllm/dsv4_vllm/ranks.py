"""dsv4's ranks in vLLM's worker processes: tensor parallel over its tensor-parallel group."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

from dsv4_core.checkpoint.rank_part import Place
from dsv4_core.contract.rendezvous import Rendezvous
from dsv4_core.ranks.exchange import Ranks
from dsv4_core.ranks.team import Team
from dsv4_core.ranks.watch import Watch

if TYPE_CHECKING:
    from vllm.distributed.parallel_state import GroupCoordinator


def team(backend: Any, group: GroupCoordinator) -> Team:
    """Meet the other workers of this host: torch.distributed is vLLM's, the store that dsv4's watch
    over lost ranks needs is dsv4's own.
    """
    port = None
    if group.rank_in_group == 0:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
    where = Rendezvous(
        rank=group.rank_in_group,
        ranks=group.world_size,
        local_rank=group.local_rank,
        host="127.0.0.1",
        port=group.broadcast_object(port, src=0),
        hosted=False,
        attempt="0",
    )
    world = backend.process_group(where)
    watch = Watch(world.store, rank=where.rank, ranks=where.ranks, holder=where.holder, place=where.place)
    return Team(Ranks(backend, Place(where.ranks, 1, where.rank), world, watch))
