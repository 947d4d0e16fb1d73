"""A fixture for every recorded checkpoint; folders whose library is not installed are left out."""

import os
from importlib.util import find_spec

for _variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):  # before a library reads them: a worker a core
    os.environ.setdefault(_variable, "1")

import pytest  # noqa: E402
from recorded import RECORDED  # noqa: E402

collect_ignore = [] if find_spec("torch") else ["torch_backend", "cuda", "ascend", "parallel"]
if not find_spec("triton"):
    collect_ignore.append("cuda")


@pytest.fixture(params=RECORDED)
def recorded(request) -> str:
    return request.param
