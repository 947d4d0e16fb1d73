"""What pyproject.toml cannot say: a wheel that carries compiled kernels is for one platform, and
for every Python from 3.10 on.
"""

from pathlib import Path

from setuptools import Distribution, setup

CARRIED = any((Path(__file__).parent / "backends" / "torch" / "dsv4_backend_torch" / "built").glob("*.so"))


class Carrying(Distribution):
    """A distribution with compiled files, where there are any."""

    def has_ext_modules(self) -> bool:
        """Whether the wheel is for one platform."""
        return CARRIED


setup(distclass=Carrying, options={"bdist_wheel": {"py_limited_api": "cp310"}} if CARRIED else {})
