"""Kept kernels: the user's own, closed to others, what their hash says; built again where they are
not, by one process at a time.
"""

import os
import shutil
import stat
import subprocess
import sys

import pytest

pytest.importorskip("torch")

from dsv4_backend_torch import kept, threads

pytestmark = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty cache folder, and a compiler that makes a library of one function at once and counts
    how often.
    """
    fake = tmp_path / "fakecc"
    source = tmp_path / "one.c"
    source.write_text("int one(void) { return 1; }\n")
    fake.write_text(
        f'#!/bin/sh\ncase "$*" in *-dM*) echo \'#define __VERSION__ "1"\'; exit;; esac\n'
        f"echo x >> {tmp_path}/count\nfor last; do :; done\nexec cc -shared -fPIC {source} -o $last\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("CC", str(fake))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kept.library.cache_clear()
    yield tmp_path
    kept.library.cache_clear()


def library():
    kept.library.cache_clear()
    return kept.library()[0]


def builds(home):
    return len((home / "count").read_text().split()) if (home / "count").exists() else 0


def test_built_once_and_found_again(home):
    path = library()
    assert kept.sound(path)
    assert (library(), builds(home)) == (path, 1)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0


def cut(path):
    path.write_bytes(path.read_bytes()[:4096])


def zeroed(path):
    path.write_bytes(path.read_bytes()[:-512] + bytes(512))


def linked(path):
    aside = path.with_name("aside")
    path.rename(aside)
    path.symlink_to(aside)


def open_to_all(path):
    path.chmod(0o666)


def no_hash(path):
    path.with_suffix(".sha256").unlink()


def fifo(path):
    path.unlink()
    os.mkfifo(path)


def anothers(path):
    if os.geteuid():
        pytest.skip("only root may give a file away")
    os.chown(path, 65534, 65534)


@pytest.mark.parametrize("spoil", [cut, zeroed, linked, open_to_all, no_hash, fifo, anothers], ids=lambda f: f.__name__)
def test_what_is_not_sound_is_built_again(home, spoil):
    path = library()
    spoil(path)
    assert not kept.sound(path)
    assert kept.sound(library())
    assert not path.is_symlink()
    assert builds(home) == 2


def test_a_folder_that_others_may_enter_is_closed(home):
    path = library()
    path.parent.chmod(0o777)
    library()
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_folder_that_is_a_link_or_anothers_is_refused(home, monkeypatch):
    (home / "cache").mkdir()
    (home / "elsewhere").mkdir()
    (home / "cache" / "dsv4").symlink_to(home / "elsewhere")
    with pytest.raises(kept.NotCompiledError, match="a link is not followed"):
        library()
    (home / "cache" / "dsv4").unlink()
    library()
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(kept.NotCompiledError, match=r"belongs to user \d+, not to you \(4711\)"):
        library()


def test_a_relative_folder_is_not_the_working_directory(home, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(home / "own"))
    monkeypatch.chdir(home)
    assert library().is_relative_to(home / "own" / ".cache" / "dsv4")


@pytest.mark.parametrize(
    ("command", "said"),
    [("'", 'CC="\'" is no command'), ("/etc", "'/etc' does not start"), ("sleep 9 #", "was ended after 0.2 s")],
)
def test_a_compiler_that_is_none(home, monkeypatch, command, said):
    monkeypatch.setenv("CC", command)
    monkeypatch.setattr(kept, "PATIENCE", 0.2)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    if command.startswith("sleep"):
        hanging = home / "hang"
        hanging.write_text("#!/bin/sh\nexec sleep 9\n")
        hanging.chmod(0o755)
        monkeypatch.setenv("CC", str(hanging))
    with pytest.raises(kept.NotCompiledError, match=said):
        library()


def test_a_compiler_gets_longer_where_more_processes_than_cores_run(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for load, times in ((0.0, 1), (2.0, 1), (16.0, 8)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert kept.patience() == times * kept.PATIENCE


def test_processes_that_come_at_once_build_once(home):
    code = "from dsv4_backend_torch import kept; print(kept.library()[0])"
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {each.communicate(timeout=120)[0] for each in started}
    assert [each.returncode for each in started] == [0, 0, 0]
    assert len(paths) == 1
    assert builds(home) == 1


def test_a_package_carries_libraries_and_the_best_that_this_cpu_runs_is_taken(home, monkeypatch):
    made = kept.carry(home / "built")
    assert [path.name.partition("-")[0] for path in made] == list(kept.LEVELS)
    for (level, (_, needed)), path in zip(kept.LEVELS.items(), made, strict=True):
        monkeypatch.setattr(kept, "cpu_flags", lambda needed=needed: frozenset(needed))
        assert kept.carried(home / "built") == (path, f"{level}, carried by the package")
    monkeypatch.setattr(kept, "cpu_flags", frozenset)
    assert all(needed for _, needed in kept.LEVELS.values()) == (kept.carried(home / "built") is None)
    monkeypatch.setattr(kept, "FLAGS", (*kept.FLAGS, "-Dother"))
    monkeypatch.setattr(kept, "cpu_flags", lambda: frozenset().union(*(needed for _, needed in kept.LEVELS.values())))
    assert kept.carried(home / "built") is None  # made of other sources, or otherwise


def test_what_is_carried_is_used_unless_a_compiler_is_named(home, monkeypatch):
    made = kept.carry(home / "built")
    monkeypatch.setattr(kept, "cpu_flags", lambda: frozenset().union(*(needed for _, needed in kept.LEVELS.values())))
    monkeypatch.setattr(kept.carried, "__defaults__", (home / "built",))
    assert library().is_relative_to(home / "cache")
    monkeypatch.delenv("CC")
    assert library() == made[0]


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, float("inf")),
        ({"cpu.max": "max 100000"}, float("inf")),
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, float("inf")),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4.0),
        ({"cpu.max": "nonsense"}, float("inf")),
    ],
)
def test_a_control_groups_share(tmp_path, files, cores):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads.quota(tmp_path) == cores
    assert 1 <= threads.cores() <= (os.cpu_count() or 1)


def test_threads_of_a_busy_machine_do_not_wait_without_end():
    code = "import os, dsv4_backend_torch; print(os.environ.get('GOMP_SPINCOUNT'))"
    for given, want in (({}, "100000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")):
        env = {k: v for k, v in os.environ.items() if k not in {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}} | given
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == want
