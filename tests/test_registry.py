"""Which backend is chosen, and what is said when it cannot be had."""

import os
import subprocess
import sys

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
    with pytest.raises(BackendError, match=r"run.backend = 3 must be a string"):
        registry.choose(None)


def test_unknown_backend_lists_the_known():
    with pytest.raises(BackendError, match=r"unknown backend 'gpu'; installed: .*reference.*`dsv4 backends`"):
        registry.create("gpu")


def distribution(folder, name, *, points="", requires=(), version="1.2", metadata_text=None):
    """A distribution as an installer leaves it: metadata and entry points, in a folder of the
    path.
    """
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *(f"Requires-Dist: {r}" for r in requires)]
    (info / "METADATA").write_text(metadata_text if metadata_text is not None else "\n".join(lines) + "\n")
    (info / "entry_points.txt").write_text(points)


def fresh():
    registry.installed.cache_clear()
    registry._read.cache_clear()


@pytest.fixture
def site(monkeypatch, tmp_path):
    """A folder that modules and distributions are found in, before any other."""
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "vendor_plugin", raising=False)
    (tmp_path / "site").mkdir()
    fresh()
    yield tmp_path / "site"
    monkeypatch.undo()
    fresh()


@pytest.fixture
def vendor(site):
    def install(source, extra="", requires=()):
        (site / "vendor_plugin.py").write_text(source)
        points = f"[dsv4.backends]\nvendor = vendor_plugin{f' [{extra}]' if extra else ''}\n"
        distribution(site, "dsv4-vendor", points=points, requires=requires)

    return install


def test_a_vendors_plug_in(vendor):
    vendor(
        "from dsv4_core.contract.backend import Backend\nfrom dsv4_core.contract.registry import hookimpl\n"
        "class V(Backend):\n    name = 'vendor'\n@hookimpl\ndef dsv4_backend():\n    return V\n"
    )
    assert registry.create("vendor").name == "vendor"
    assert registry.installed()["vendor"].missing == ()


def test_a_missing_library_is_named_with_its_command(vendor):
    requires = ['nosuchlib>=2; extra == "fast"', "numpy"]
    vendor("import nosuchlib\n", extra="fast", requires=requires)
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


GOOD = "from dsv4_core.contract.backend import Backend\nfrom dsv4_core.contract.registry import hookimpl\nclass V(Backend):\n    name = 'vendor'\n"
HOOK = "@hookimpl\ndef dsv4_backend():\n    "


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise SystemExit(0)", "failed to import: SystemExit: 0"),
        ("import os\nclass P(BaseException): pass\nraise P('panicked')", "failed to import: P: panicked"),
        (GOOD + HOOK + "return 5", "gave 5, which is no subclass"),
        (GOOD + HOOK + "return object()", "which is no subclass"),
        (GOOD + HOOK + "return 'V'", "gave 'V', which is no subclass"),
        (GOOD + HOOK + "return {}", "gave {}, which is no subclass"),
        (GOOD + HOOK + "raise KeyError('x')", "failed in its hook dsv4_backend: KeyError: 'x'"),
        (GOOD + HOOK + "raise SystemExit", "failed in its hook dsv4_backend: SystemExit"),
        (GOOD + "    def rms_norm(self, y): ...\n" + HOOK + "return V", "failed to import: TypeError: V.rms_norm"),
        (GOOD + "    def __init__(self): pass\n" + HOOK + "return V", "cannot start: TypeError"),
        (GOOD + "    def __init__(self, **o): pass\n" + HOOK + "return V", "its constructor does not call Backend's"),
        (
            GOOD + "    def __init__(self, **o): raise SystemExit(0)\n" + HOOK + "return V",
            "cannot start: SystemExit: 0",
        ),
    ],
)
def test_whatever_a_plug_in_does_is_an_error_that_names_it(vendor, source, said):
    vendor(source)
    with pytest.raises(BackendError) as caught:
        registry.create("vendor", numerics="native")
    assert "'vendor'" in str(caught.value)
    assert said in str(caught.value)
    assert registry.create("reference").name == "reference"


@pytest.mark.parametrize(
    "broken",
    [
        {"requires": ["numpy>>>3 garbage ;;"]},
        {"points": "[dsv4.backends]\nvendor\n"},
        {"points": "[dsv4.backends]\nvendor =\n"},
        {"points": "[dsv4.backends]\nvendor = 9:::x\n"},
        {"points": "[dsv4.commands]\nvendor = nosuchmodule:command\n"},
        {"metadata_text": ""},
        {"metadata_text": "\x00\xff"},
    ],
)
def test_a_broken_distribution_is_one_line_and_stops_nobody(site, broken):
    distribution(site, "dsv4-vendor", **{"points": "[dsv4.backends]\nvendor = vendor_plugin\n", **broken})
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path}
    for arguments in (["backends"], ["--help"], ["generate", "--tokens", "5", "-n", "1", "-b", "reference"]):
        done = subprocess.run(
            [sys.executable, "-m", "dsv4_core", *arguments],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr + done.stdout
    if "requires" in broken or "commands" not in broken.get("points", ""):
        said = subprocess.run(
            [sys.executable, "-m", "dsv4_core", "backends"],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        assert "vendor" in said.stdout + said.stderr


def test_no_distribution_replaces_what_is_dsv4s_own(site):
    (site / "evil.py").write_text("raise RuntimeError('imported')\n")
    distribution(
        site, "evil", points="[dsv4.backends]\nreference = evil\n[dsv4.oracles]\nreference = evil\nother = evil\n"
    )
    assert registry.create("reference").name == "reference"
    assert registry.reference().name == "reference"
    assert any("distribution evil registers 'reference'" in line for line in registry.faults())


def test_another_oracle_judges_only_by_name(site, monkeypatch, capsys):
    (site / "oracles.py").write_text("def make(**given): return given\n")
    distribution(site, "dsv4-other", points="[dsv4.oracles]\nother = oracles:make\n")
    assert not isinstance(registry.oracle("native", {}), dict)
    monkeypatch.setenv("DSV4_ORACLE", "other")
    assert registry.oracle("native", {}) == {"numerics": "native", "narrower": {}}
    assert "judged by the oracle 'other' of distribution dsv4-other 1.2" in capsys.readouterr().err
    monkeypatch.setenv("DSV4_ORACLE", "third")
    with pytest.raises(BackendError, match="no such oracle is installed; there is"):
        registry.oracle("native", {})


def test_two_of_one_name_run_neither(site):
    for name in ("dsv4-one", "dsv4-two"):
        distribution(site, name, points="[dsv4.backends]\nvendor = vendor_plugin\n")
    with pytest.raises(BackendError, match=r"registered by dsv4-one 1.2 and dsv4-two 1.2; uninstall all but one"):
        registry.create("vendor")


def test_a_requirement_whose_module_has_another_name_is_found(site, vendor):
    vendor(GOOD + HOOK + "return V", requires=["PyYAML>=3", "pluggy>=1", "nosuch-thing"])
    distribution(site, "PyYAML", version="6.0")
    assert registry.installed()["vendor"].missing == ("nosuch-thing",)
