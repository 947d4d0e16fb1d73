"""What is said of each state of an installation: no torch-npu, one that is broken, one whose ops
differ, chips and CANN; and that no other backend touches torch-npu. Each in a process of its own,
with stand-ins for torch-npu on its path.
"""

import os
import shutil
import subprocess
import sys

import pytest
from dsv4_backend_ascend.schema import schemas, snapshots

from dsv4_core.checkpoint.weights import embedded

BROKEN = """
import os
open(os.environ["TOUCHED"], "a").write("touched")
raise ImportError("libhccl.so: cannot open shared object file")
"""
WORKING = """
import os
import torch

LIBRARY = torch.library.Library("npu", "DEF")
for schema in {schemas!r}:
    LIBRARY.define(schema.removeprefix("npu::"))


class Npu:
    is_available = staticmethod(lambda: bool(os.environ["SOC"]))
    device_count = staticmethod(lambda: 1)

    @staticmethod
    def get_device_name(_device):
        if os.environ["SOC"] == "half":
            raise RuntimeError("Failed to find function aclrtSetDeviceSatMode")
        return os.environ["SOC"]


torch.npu = Npu
_autoload = lambda: None
"""
METADATA = "Metadata-Version: 2.1\nName: torch-npu\nVersion: 2.13.0\n"
ENTRY_POINTS = "[torch.backends]\ntorch_npu = torch_npu:_autoload\n"


class Machine:
    """A folder with a torch-npu, and processes that find it."""

    def __init__(self, folder):
        self.folder = folder
        self.touched = folder / "touched"

    def install(self, source):
        (self.folder / "torch_npu").mkdir()
        (self.folder / "torch_npu" / "__init__.py").write_text(source)
        info = self.folder / "torch_npu-2.13.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(METADATA)
        (info / "entry_points.txt").write_text(ENTRY_POINTS)

    def run(self, *arguments, autoload=None, **variables):
        env = {k: v for k, v in os.environ.items() if k not in {"TORCH_DEVICE_BACKEND_AUTOLOAD", "ASCEND_HOME_PATH"}}
        path = ":".join([str(self.folder), *(path for path in sys.path if path)])
        env |= {"PYTHONPATH": path, "TOUCHED": str(self.touched), "COLUMNS": "500", **variables}
        if autoload is not None:
            env["TORCH_DEVICE_BACKEND_AUTOLOAD"] = autoload
        done = subprocess.run(
            [sys.executable, *arguments], env=env, cwd=self.folder, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr

    def python(self, code, **options):
        return self.run("-c", code, **options)

    def dsv4(self, *arguments, **options):
        return self.run("-m", "dsv4_core", *arguments, **options)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def working(*, without=(), changed=()):
    kept = [s for op, s in snapshots()[-1].schemas.items() if op not in without]
    return WORKING.format(schemas=[s.replace("float epsilon=", "float eps=") if s in changed else s for s in kept])


def of_wheel(snapshot):
    return WORKING.format(schemas=list(snapshot.schemas.values()))


FORWARD = """
import numpy as np
import dsv4_core
from dsv4_core.contract import registry
for name in ("reference", {names}):
    backend = registry.create(name)
    x = backend.from_numpy(np.ones((2, 8), np.float32))
    backend.rms_norm(x, None, eps=1e-6)
    print(name, "ran")
"""


@pytest.mark.parametrize("autoload", [None, "0"], ids=["unset", "off"])
def test_no_other_backend_touches_a_broken_torch_npu(machine, autoload):
    machine.install(BROKEN)
    code, said = machine.python(FORWARD.format(names='"torch",'), autoload=autoload)
    assert code == 0, said
    assert "torch ran" in said
    code, said = machine.python("import dsv4_backend_cuda.backend", autoload=autoload)
    assert code == 0 or "triton" in said, said
    for command in (["backends"], ["explain", "--backend", "torch"], ["explain", "--backend", "reference"], ["--help"]):
        code, said = machine.dsv4(*command, autoload=autoload)
        assert code == 0, said
    assert not machine.touched.exists()


def test_with_autoload_asked_for_the_reference_still_runs_and_torch_says_why_not(machine):
    machine.install(BROKEN)
    code, said = machine.python(FORWARD.format(names=""), autoload="1")
    assert code == 0, said
    assert not machine.touched.exists()
    code, said = machine.dsv4("explain", "--backend", "torch", autoload="1")
    assert code != 0
    assert "Traceback" not in said
    assert (
        "backend 'torch' (dsv4_backend_torch) failed to import: RuntimeError: Failed to load the backend extension: torch_npu."
        in said
    )
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in said


def test_the_torch_backend_loads_the_extension_of_a_device_that_torch_lacks(machine):
    machine.install(BROKEN)
    code, said = machine.dsv4("explain", "--backend", "torch", "--device", "npu")
    assert code != 0
    assert "backend 'torch': device 'npu' needs an extension of torch, and torch_npu does not load: libhccl.so" in said
    assert machine.touched.exists()


def test_without_torch_npu(machine):
    code, said = machine.dsv4("explain", "--backend", "ascend")
    assert code == 2
    assert "Traceback" not in said
    assert "backend 'ascend' needs torch-npu, not found here: pip install 'dsv4[ascend]'" in said
    assert "plan without an NPU: --soc 910B, 910C or 950; compute on a CPU: --simulate CHIP" in said


def test_with_torch_npu_but_no_cann(machine):
    machine.install(BROKEN)
    code, said = machine.dsv4("explain", "--backend", "ascend")
    assert code == 2
    assert "torch-npu is installed and does not import: libhccl.so: cannot open shared object file" in said
    assert "source CANN's set_env.sh" in said
    code, said = machine.dsv4("doctor", "--backend", "ascend")
    assert code == 1
    assert "2.13.0, does not import: libhccl.so: cannot open shared object file" in said
    code, said = machine.dsv4("explain", "--backend", "ascend", "--simulate", "950")
    assert code == 2
    assert "simulated CANN does not load beside it" in said
    code, said = machine.dsv4("explain", "--backend", "ascend", "--soc", "950")
    assert code == 0, said
    assert "planned for 950" in said


def test_the_simulator_does_not_load_beside_a_torch_npu_that_works(machine):
    machine.install(working())
    for arguments in (["explain"], ["ascend", "selftest", "--small"]):
        named = [] if arguments[0] == "ascend" else ["--backend", "ascend"]
        code, said = machine.dsv4(*arguments, *named, "--simulate", "910B", SOC="Ascend910B3")
        assert code == 2
        assert "torch-npu is installed: simulated CANN does not load beside it" in said


def test_no_npu(machine):
    machine.install(working())
    code, said = machine.dsv4("explain", "--backend", "ascend", "--device", "cpu", SOC="")
    assert code == 2
    assert "torch-npu finds no NPU (npu-smi info lists them)" in said


def test_half_of_cann(machine):
    machine.install(working())
    code, said = machine.dsv4("explain", "--backend", "ascend", "--device", "cpu", SOC="half")
    assert code == 2
    assert (
        "torch-npu imports, and fails when it is asked for NPUs: Failed to find function aclrtSetDeviceSatMode" in said
    )
    assert "Is CANN, of unknown version, the one that torch-npu 2.13.0 was built for?" in said
    code, said = machine.dsv4("doctor", "--backend", "ascend", "--device", "cpu", SOC="half")
    assert code == 1
    assert "could not be asked for" in said
    assert "910B cann" in said
    code, said = machine.dsv4("explain", "--backend", "ascend", "--soc", "910C", SOC="half")
    assert code == 0, said
    assert "planned for 910C" in said


def test_an_unknown_chip(machine):
    machine.install(working())
    code, said = machine.dsv4("explain", "--backend", "ascend", "--device", "cpu", SOC="Ascend310P3")
    assert code == 2
    assert "SoC 'Ascend310P3' is none that the capability table covers (910B, 910C, 950)" in said
    assert "say so with --soc" in said
    code, said = machine.dsv4("doctor", "--backend", "ascend", "--device", "cpu", SOC="Ascend310P3")
    assert code == 1
    assert "1 x Ascend310P3" in said
    code, said = machine.dsv4("explain", "--backend", "ascend", "--device", "cpu", "--soc", "910B", SOC="Ascend310P3")
    assert code == 0, said
    assert "found 910B" in said


def test_a_chip_that_is_there(machine):
    machine.install(working())
    code, said = machine.dsv4("doctor", "--backend", "ascend", "--device", "cpu", SOC="Ascend910_9362")
    assert code == 0, said
    assert "ascend (configured: chosen by --backend): can run" in said
    assert f"all {len(snapshots()[-1].schemas)} of torch-npu that are called are there, and take the calls" in said
    assert "1 x Ascend910_9362: 910C" in said
    assert "910C cann" in said
    assert "950 cann" not in said
    assert "not run: no rung above L3 is recorded" in said


@pytest.mark.parametrize("snapshot", snapshots(), ids=lambda s: s.wheel)
def test_no_op_is_lost_on_a_wheel_whose_schemas_differ_where_nothing_is_passed(machine, snapshot):
    machine.install(of_wheel(snapshot))
    explain = ["explain", "--backend", "ascend", "--device", "cpu", "--model", "flash"]
    code, said = machine.dsv4(*explain, SOC="Ascend910B3")
    assert code == 0, said
    for op in ("npu_mhc_post", "npu_transpose_batchmatmul", "npu_rms_norm", "npu_grouped_matmul"):
        assert f"cann: {op}" in said
    assert "is missing" not in said
    assert "UserWarning" not in said  # what 910B is not given is not warned of


def test_a_missing_op_and_another_schema_are_named_before_weights_load(machine):
    machine.install(working(without=["npu_clipped_swiglu"], changed=[schemas()["npu_rms_norm"]]))
    code, said = machine.dsv4("doctor", "--backend", "ascend", "--device", "cpu", SOC="Ascend910B3")
    assert "npu::npu_clipped_swiglu is missing in the installed torch-npu" in said
    assert "npu::npu_rms_norm has no argument 'epsilon', which is passed" in said
    code, said = machine.dsv4("explain", "--backend", "ascend", "--device", "cpu", SOC="Ascend910B3")
    assert code == 0, said
    assert "composed: npu::npu_clipped_swiglu is missing in the installed torch-npu" in said
    assert "composed: npu::npu_rms_norm has no argument 'epsilon', which is passed" in said
    copy = shutil.copytree(embedded(), machine.folder / "model")
    for shard in copy.glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    generate = ["generate", str(copy), "--tokens", "5,6", "--max-tokens", "1", "--backend", "ascend", "--device", "cpu"]
    code, said = machine.dsv4(*generate, SOC="Ascend910B3")
    assert code != 0
    assert "safetensors" in said  # half of each shard is missing, and the ops were named all the same
    assert said.index("npu::npu_clipped_swiglu is missing in the installed torch-npu") < said.index("safetensors")
