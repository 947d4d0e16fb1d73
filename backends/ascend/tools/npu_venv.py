"""A virtual environment in which the real torch-npu wheel imports on a machine without CANN.

``build`` installs the wheel and stands in for CANN: the shared objects that the wheel links
against, holding one C function that returns 0 for each C symbol that CANN would provide. ``run``
executes a script there. What that gives is schemas, shape functions and fake ``npu`` tensors;
nothing can be computed.

    python backends/ascend/tools/npu_venv.py --venv DIR build --wheel 2.10.0.post4 python
    backends/ascend/tools/npu_venv.py --venv DIR run backends/ascend/tools/snapshot_schemas.py

``DIR`` lies outside the repository: each wheel has an environment of its own, with the torch that
it pins.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

WHEELS = {"2.9.0.post2": "2.9.0", "2.10.0.post4": "2.10.0", "2.13.0": "2.13.0"}
"""torch-npu's versions that are compared with, each with the torch that it pins."""
REQUIREMENTS = ("numpy", "pyyaml", "ml-dtypes", "msgspec", "packaging", "safetensors", "pluggy", "click")
CANN_PREFIXES = ("acl", "rt", "Msprof")  # families of C symbols that only CANN defines


def needed(library: Path) -> set[str]:
    """Names of the shared objects that ``library`` links against."""
    text = subprocess.run(["readelf", "-d", str(library)], check=True, capture_output=True, text=True).stdout
    return {line.split("[")[1].rstrip("]") for line in text.splitlines() if "(NEEDED)" in line}


def undefined(library: Path) -> set[str]:
    """C symbols that ``library`` expects from CANN."""
    text = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], check=True, capture_output=True, text=True
    ).stdout
    names = (line.split()[-1] for line in text.splitlines())
    return {name for name in names if name.startswith(CANN_PREFIXES) and "@" not in name}


def stand_in(symbol: str) -> str:
    """C source of one stand-in: there is one device, it can be set, and it has no memory;
    everything else does nothing.
    """
    if symbol == "aclrtGetDeviceCount":
        return f"long {symbol}(unsigned *count) {{ *count = 1; return 0; }}\n"
    failed = int(symbol.startswith("aclrtMalloc"))
    return f"long {symbol}(void) {{ return {failed}; }}\n"


def package(root: Path) -> Path:
    """Folder of torch_npu inside the environment."""
    found = sorted(root.glob("lib/python3*/site-packages/torch_npu"))
    if not found:
        raise SystemExit(f"no torch_npu under {root}; run `npu_venv.py --venv {root} build` first")
    return found[0]


def build(root: Path, wheel: str) -> None:
    """Install a wheel if it is missing, then compile the stand-ins."""
    if not (root / "bin" / "python").exists():
        venv.create(root, with_pip=True)
        pip = [str(root / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, f"torch=={WHEELS[wheel]}", *REQUIREMENTS], check=True)
        # some wheels pin torch's "+cpu" build, which PyPI does not have; any build of that version
        # serves here
        subprocess.run([*pip, "--no-deps", f"torch-npu=={wheel}"], check=True)
    torch_npu = package(root)
    libraries = [
        *torch_npu.glob("*.so"),
        *torch_npu.glob("lib/libtorch_npu.so"),
        *torch_npu.glob("lib/libtensorpipe.so"),
    ]
    symbols = sorted(set().union(*map(undefined, libraries)))
    loaded = subprocess.run(["ldconfig", "-p"], check=True, capture_output=True, text=True).stdout
    own = {path.name for path in [*torch_npu.glob("lib/*"), *torch_npu.parent.glob("torch/lib/*")]}
    missing = sorted(name for name in set().union(*map(needed, libraries)) - own if name not in loaded)
    stubs = root / "cann-stubs"
    stubs.mkdir(exist_ok=True)
    (stubs / "cann.c").write_text("".join(map(stand_in, symbols)))
    (stubs / "empty.c").write_text("")
    for name in missing:
        source = stubs / ("cann.c" if name == "libascendcl.so" else "empty.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", str(stubs / name), str(source)], check=True)
    print(f"{len(symbols)} symbols, {len(missing)} libraries: {', '.join(missing)}")


def environment(root: Path) -> dict[str, str]:
    """Environment variables under which the wheel imports: stand-ins found, no autoload by a plain
    ``import torch``.
    """
    return {
        **os.environ,
        "LD_LIBRARY_PATH": f"{root / 'cann-stubs'}:{package(root) / 'lib'}",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=Path(".venv-npu"))
    commands = parser.add_subparsers(dest="command", required=True)
    wanted = commands.add_parser("build")
    wanted.add_argument("--wheel", choices=WHEELS, default=list(WHEELS)[-1], help="version of torch-npu")
    run = commands.add_parser("run")
    run.add_argument("script")
    run.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    root = args.venv.resolve()
    if args.command == "build":
        build(root, args.wheel)
        return 0
    return subprocess.run(
        [str(root / "bin" / "python"), args.script, *args.arguments], env=environment(root), check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
