"""Who may import whom, what importing costs, and that the graph uses nothing of an array but the
protocol.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from dsv4_conformance.model import golden
from recorded import relative, vectors

from dsv4_core.checkpoint.weights import Checkpoint
from dsv4_core.contract.backend import Backend
from dsv4_core.contract.dtypes import ScaledArray
from dsv4_core.contract.ops import OPS
from dsv4_core.contract.registry import create
from dsv4_core.graph.evaluate import teacher_forced
from dsv4_core.graph.model import Model

ROOT = Path(__file__).parent.parent
LIBRARIES = {"torch", "triton", "torch_npu"}
BACKENDS = {p.name for p in ROOT.glob("backends/*/dsv4_backend_*")}
FAMILY = {"dsv4_backend_cuda": {"dsv4_backend_torch"}, "dsv4_backend_ascend": {"dsv4_backend_torch"}}
CORE, SUITE = ROOT / "dsv4_core", ROOT / "conformance/dsv4_conformance"
BACKEND_ROOTS = sorted(ROOT.glob("backends/*/dsv4_backend_*"))
ROOMS = {
    "dsv4_core": [
        "version",
        "files",
        "contract",
        "checkpoint",
        "graph",
        "ranks",
        "planning",
        "text",
        "generation",
        "session",
        "cli",
        "__main__",
    ],
    "dsv4_conformance": [
        *("verdict", "check", "files", "cases", "laws", "exchange", "model", "run", "report", "museum", "cli"),
    ],
}


def imports(path, *, lazy=True):
    """Modules that a file imports; without ``lazy`` those inside functions and TYPE_CHECKING blocks
    are left out.
    """
    tree = ast.parse(path.read_text())
    found = set()

    def visit(node):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            hidden = isinstance(child, ast.FunctionDef) or (
                isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            )
            if lazy or not hidden:
                visit(child)

    visit(tree)
    return found


def tops(path):
    return {name.partition(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", sorted(ROOT.glob("dsv4_core/**/*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_core_imports_no_backend_no_suite_no_device_library(path):
    assert not tops(path) & (BACKENDS | LIBRARIES | {"dsv4_conformance"})
    assert "pluggy" not in tops(path) or path.name == "registry.py"


@pytest.mark.parametrize("path", sorted(ROOT.glob("conformance/**/*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_conformance_names_no_backend(path):
    assert not tops(path) & (BACKENDS | LIBRARIES)


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("backends/*/dsv4_backend_*/**/*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_backends_do_not_import_each_other(path):
    mine = next(part for part in path.parts if part.startswith("dsv4_backend_"))
    assert not tops(path) & (BACKENDS - {mine} - FAMILY.get(mine, set())), path
    assert "dsv4_conformance" not in tops(path)


def modules(root):
    """Every module of a package by its dotted name."""
    return {
        ".".join((root.name, *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in root.rglob("*.py")
    }


MODULES = {name: path for root in (CORE, SUITE, *BACKEND_ROOTS) for name, path in modules(root).items()}


def imported(name):
    """Modules of ours that a module imports anywhere in its file, for types too."""
    found = imports(MODULES[name]) & MODULES.keys()
    return {n for n in found if n != name and not any(m.startswith(f"{n}.") for m in found)}


def circles(edges):
    """Groups of nodes that reach each other."""
    reach = {node: set(targets) for node, targets in edges.items()}
    for middle in edges:
        for targets in reach.values():
            if middle in targets:
                targets.update(reach[middle])
    return {
        frozenset(n for n in edges if n in reach[node] and node in reach[n]) for node in edges if node in reach[node]
    }


def test_no_file_imports_itself_by_way_of_others():
    assert not circles({name: imported(name) for name in MODULES})


def room(name):
    """The package below the root that a module lives in; a file in the root is a room of its
    own.
    """
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


@pytest.mark.parametrize(("package", "order"), ROOMS.items())
def test_rooms_import_in_one_order(package, order):
    stable = {f"{package}.{name}" for name in ("backend", "registry", "dtypes")}
    for name in MODULES:
        if name.partition(".")[0] != package or room(name) == "" or name in stable:
            continue
        assert room(name) in order, f"{name}: say in ROOMS where its room stands"
        for other in imported(name):
            if other.partition(".")[0] == package and room(other):
                assert other not in stable, f"{name} imports {other}, which is there for plug-ins alone"
                assert order.index(room(other)) <= order.index(room(name)), f"{name} imports {other}, upwards"


def test_every_room_says_what_belongs_there():
    for name, path in MODULES.items():
        if path.name == "__init__.py" and name.count(".") == 1:
            assert (ast.get_docstring(ast.parse(path.read_text())) or "").count(".") >= 1, f"{name} has no sentence"


def test_model_imports_no_array_library():
    assert not {"numpy", "ml_dtypes"} & {name.partition(".")[0] for name in imports(ROOT / "dsv4_core/graph/model.py")}


def test_every_package_is_in_the_distribution():
    listed = re.search(r"packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL)[1]
    roots = [ROOT / "dsv4_core", ROOT / "conformance/dsv4_conformance", *ROOT.glob("backends/*/dsv4_backend_*")]
    for root in roots:
        for init in root.rglob("__init__.py"):
            package = ".".join(init.parent.relative_to(root.parent).parts)
            assert f'"{package}"' in listed, f"{package} is missing from [tool.setuptools] packages"


@pytest.mark.parametrize(
    "module", ["dsv4_core", "dsv4_core.cli", "dsv4_core.graph.model", "dsv4_backend_reference", "dsv4_conformance"]
)
def test_importing_pulls_in_no_device_library(module):
    code = f"import sys, {module}; print(sorted({LIBRARIES!r} & sys.modules.keys()))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_listing_backends_imports_none():
    unwanted = LIBRARIES | {f"{name}.backend" for name in BACKENDS} | {"numpy"}
    run = "import sys; sys.argv = ['dsv4', 'backends']\nfrom dsv4_core.cli import main\ntry: main()\n"
    code = f"{run}finally: print(sorted({unwanted!r} & sys.modules.keys()))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip().endswith("[]"), out
    assert "reference" in out


class StrictArray:
    """An array with nothing but the protocol: any arithmetic, comparison, iteration or conversion
    raises.
    """

    __slots__ = ("_value",)
    __array__ = None  # NumPy must not look inside
    __array_ufunc__ = None
    __iter__ = None
    __bool__ = None
    __eq__ = None
    __hash__ = None

    def __init__(self, value):
        self._value = value

    @property
    def shape(self):
        return self._value.shape

    @property
    def dtype(self):
        return self._value.dtype

    def reshape(self, shape, /):
        assert isinstance(shape, tuple)
        assert all(type(n) is int for n in shape)
        return StrictArray(self._value.reshape(shape))

    def __getitem__(self, key, /):
        for part in key if isinstance(key, tuple) else (key,):
            assert type(part) in {int, slice}, f"only integers and slices index an array, not {part!r}"
        return StrictArray(self._value[key])


def _inside(x):
    if isinstance(x, StrictArray):
        return x._value
    if isinstance(x, ScaledArray):
        return ScaledArray(_inside(x.data), _inside(x.scale), x.format)
    return [_inside(v) for v in x] if isinstance(x, list | tuple) else x


def _outside(x):
    return tuple(map(_outside, x)) if isinstance(x, tuple) else StrictArray(x) if isinstance(x, np.ndarray) else x


class StrictBackend(Backend):
    """The reference behind strict arrays; fused ops run as their defaults, so that these are held
    to the protocol too.
    """

    name = "strict"

    def __init__(self, **options):
        super().__init__(**options)
        self.inner = create("reference", **options)

    def from_numpy(self, array):
        return StrictArray(array)

    def to_numpy(self, array):
        return array._value

    def zeros(self, shape, dtype):
        return StrictArray(self.inner.zeros(shape, dtype))

    def load_experts(self, experts):
        return experts  # the reference reads them where they are


def _delegate(name):
    def method(self, *args, **kwargs):
        return _outside(getattr(self.inner, name)(*map(_inside, args), **kwargs))

    return method


for _name, _spec in OPS.items():
    if not _spec.fused:
        setattr(StrictBackend, _name, _delegate(_name))


@pytest.mark.parametrize("name", ["tiny-flash", "tiny-pro"])
def test_the_graph_keeps_to_the_array_protocol(name):
    backend = StrictBackend(numerics="float64")
    model = Model(Checkpoint(golden.checkpoint_path(name)), backend)
    want = vectors(name, "golden")
    got = teacher_forced(model, want["prompt"][:, :310], prefill=300, chunk=128, mtp=True)
    assert relative(got["logits"], want["exact.logits"][:, :11]) < 3e-6
    assert relative(got["mtp_logits"], want["exact.mtp_logits"]) < 3e-6


def test_strict_array_is_strict():
    x = StrictArray(np.ones((2, 3)))
    for use in (
        lambda: x + 1,
        lambda: np.add(x, 1),
        lambda: list(x),
        lambda: x == 1,
        lambda: x[np.array([0])],
        lambda: float(x),
        lambda: len(x),
    ):
        with pytest.raises((TypeError, AssertionError)):
            use()


WRITING = re.compile(
    r"\.write_(text|bytes)\(|\bopen\([^)]*[\"'](w|a|x|wb|ab|xb|r\+b?)[\"']|\b(mkstemp|NamedTemporaryFile)\(|\.tofile\("
    r"|\bnp\.save\w*\((?!file\b)"
)
OTHER_WRITERS = {
    "writing.py": "the one way",
    "isolate.py": "a pipe to the parent process",
    "sass.py": "a file in a temporary directory, for a tool",
    "stages.py": "a command's output as it comes: half a log is what it should be",
}


def test_files_are_written_in_one_way():
    """Whole or not at all: half a report never looks like one, whatever ends the process."""
    found = {
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for root in (CORE, SUITE, ROOT / "serve/dsv4_serve", ROOT / "integrations/vllm", *BACKEND_ROOTS)
        for path in root.rglob("*.py")
        if path.name not in OTHER_WRITERS
        for line in path.read_text().splitlines()
        if WRITING.search(line)
    }
    assert not found


def test_every_test_file_has_a_name_of_its_own():
    """Without packages pytest imports a file by its name alone, and runs all folders at once."""
    names = [path.name for path in ROOT.glob("tests/**/test_*.py")]
    assert len(names) == len(set(names)), sorted(names)
