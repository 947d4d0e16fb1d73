"""Stable for plug-ins: ``hookimpl``. Everything else about finding backends is in
``dsv4_core.contract.registry``.
"""

from dsv4_core.contract.registry import hookimpl

__all__ = ["hookimpl"]
