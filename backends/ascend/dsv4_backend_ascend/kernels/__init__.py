"""Vector kernels in Triton, for Triton-Ascend: a program for each vector core, which loops over
rows.

Written in what Triton 3.2 has, with loads and stores of whole runs. Nothing here imports torch, so
that they compile where there is none. Where they are interpreted, then by the repaired interpreter
alone.
"""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from dsv4_backend_torch import interpret

    interpret.activate()
