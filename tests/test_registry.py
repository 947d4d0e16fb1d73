"""Which backend is chosen, and what is said when it cannot be had."""

import subprocess
import sys
from importlib import metadata

import pytest

from dsv4_core.contract import registry
from dsv4_core.contract.backend import BackendError


@pytest.fixture(autouse=True)
def _no_choice(monkeypatch, tmp_path):
    monkeypatch.delenv("DSV4_BACKEND", raising=False)
    monkeypatch.chdir(tmp_path)


def test_order_flag_environment_file(monkeypatch, tmp_path):
    (tmp_path / "dsv4.toml").write_text('[run]\nbackend = "from-file"\n')
    assert registry.choose(None).name == "from-file"
    assert "dsv4.toml" in registry.choose(None).why
    monkeypatch.setenv("DSV4_BACKEND", "from-environment")
    assert registry.choose(None) == registry.Choice("from-environment", "chosen by DSV4_BACKEND")
    assert registry.choose("from-flag") == registry.Choice("from-flag", "chosen by --backend")
    assert registry.choose("auto").why.startswith("auto: ")


def test_bad_toml_names_the_file(tmp_path):
    (tmp_path / "dsv4.toml").write_text("[run\n")
    with pytest.raises(BackendError, match=r"dsv4\.toml: not TOML"):
        registry.choose(None)
    (tmp_path / "dsv4.toml").write_text("[run]\nbackend = 3\n")
    with pytest.raises(BackendError, match=r"\[run\] backend = 3 must be a backend's name in quotes"):
        registry.choose(None)


def test_unknown_backend_lists_the_known():
    with pytest.raises(BackendError, match=r"unknown backend 'gpu'; installed: .*reference.*`dsv4 backends`"):
        registry.create("gpu")


class _Entry:
    """An entry point of a distribution that is not really installed."""

    def __init__(self, module, extras=(), requires=()):
        self.name, self.module, self.extras, self.group, self.value = "vendor", module, extras, registry.GROUP, module
        self.dist = type(
            "Dist",
            (),
            {"name": "dsv4-vendor", "version": "1.2", "requires": list(requires), "metadata": {"name": "dsv4-vendor"}},
        )()
        self.dist.entry_points = [self]

    def load(self):
        return __import__(self.module)


@pytest.fixture
def vendor(monkeypatch, tmp_path):
    def install(source, **entry):
        (tmp_path / "vendor_plugin.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "vendor_plugin", raising=False)
        found = _Entry("vendor_plugin", **entry)
        monkeypatch.setattr(metadata, "entry_points", lambda **_: [found])
        monkeypatch.setattr(metadata, "distributions", lambda: [found.dist])
        registry.installed.cache_clear()

    yield install
    monkeypatch.undo()
    registry.installed.cache_clear()


def test_a_vendors_plug_in(vendor):
    vendor(
        "from dsv4_core.contract.backend import Backend\nfrom dsv4_core.contract.registry import hookimpl\n"
        "class V(Backend):\n    name = 'vendor'\n@hookimpl\ndef dsv4_backend():\n    return V\n"
    )
    assert registry.create("vendor").name == "vendor"
    assert registry.installed()["vendor"].missing == ()


def test_a_missing_library_is_named_with_its_command(vendor):
    requires = ['nosuchlib>=2; extra == "fast"', "numpy"]
    vendor("import nosuchlib\n", extras=("fast",), requires=requires)
    assert registry.installed()["vendor"].missing == ("nosuchlib>=2",)
    with pytest.raises(
        BackendError, match=r"'vendor' needs nosuchlib>=2, not found here; pip install 'dsv4-vendor\[fast\]'"
    ):
        registry.create("vendor")


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("from numpy import no_such_name", "ImportError: cannot import name"),
        ("raise OSError('libvendor.so: cannot open shared object file')", "OSError: libvendor.so: cannot open"),
    ],
)
def test_a_broken_plug_in_is_not_a_traceback(vendor, source, error):
    vendor(source)
    with pytest.raises(BackendError, match=rf"'vendor' \(vendor_plugin\) failed to import: {error}.*dsv4 doctor"):
        registry.create("vendor")


def test_a_plug_in_without_the_hook(vendor):
    vendor("dsv4_backend = None\n")
    with pytest.raises(BackendError, match="'vendor_plugin' has no hook dsv4_backend; decorate"):
        registry.create("vendor")


def test_choosing_the_reference_imports_no_other_backend():
    found = "[m for m in sys.modules if m.startswith('dsv4_backend') and '.' not in m]"
    code = f"import sys; from dsv4_core.contract import registry; registry.create('reference'); print({found})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "['dsv4_backend_reference']"
