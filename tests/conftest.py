"""A fixture for every recorded checkpoint; folders whose library is not installed are left out."""

from importlib.util import find_spec

import pytest
from recorded import RECORDED

collect_ignore = [] if find_spec("torch") else ["torch_backend", "cuda", "ascend", "parallel"]
if not find_spec("triton"):
    collect_ignore.append("cuda")


@pytest.fixture(params=RECORDED)
def recorded(request) -> str:
    return request.param
