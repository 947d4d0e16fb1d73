"""The Triton kernels, one operation a file, and the gate that none runs in an interpreter that was not repaired."""

import os

from dsv4_backend_torch import interpret

if os.environ.get("TRITON_INTERPRET") == "1":
    interpret.activate()
