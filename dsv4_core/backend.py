"""The stable names for plug-ins: whoever adds a chip imports from here, and files below may move
without breaking it.

``Backend`` is what a plug-in subclasses, ``hookimpl`` marks the function that hands it over
(``dsv4_core.registry`` has it too). CONTRIBUTING.md lists what is stable.
"""

from dsv4_core.contract.backend import Backend, BackendError, DeviceCheck, Diagnosis, Option
from dsv4_core.contract.diagnosis import Look
from dsv4_core.contract.dtypes import Experts, RowLayout, ScaledArray
from dsv4_core.contract.registry import hookimpl
from dsv4_core.contract.spec import Array, Operand, Support, UnsupportedOpError

__all__ = [
    "Array",
    "Backend",
    "BackendError",
    "DeviceCheck",
    "Diagnosis",
    "Experts",
    "Look",
    "Operand",
    "Option",
    "RowLayout",
    "ScaledArray",
    "Support",
    "UnsupportedOpError",
    "hookimpl",
]
