"""Write what the self-test expects of every case: the oracle's exact results at some elements,
``data/selftest.npz``.

python backends/ascend/tools/record_selftest.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from dsv4_backend_ascend.selftest import expectation
from dsv4_backend_ascend.selftest_cases import CASES

from dsv4_core.contract import registry

DATA = Path(__file__).resolve().parents[1] / "dsv4_backend_ascend" / "data" / "selftest.npz"


def main() -> None:
    """Record every case from its low addresses."""
    oracle = registry.oracle("native", {})
    entries: dict[str, np.ndarray] = {}
    for case in CASES:
        call = case.call()
        exact, _ = oracle.evaluate(case.contract, call.yardstick, call.scalars, samples=0, seed=0)
        entries |= expectation(case, exact)
        print(case.id)
    np.savez_compressed(DATA, **entries)  # type: ignore[arg-type]
    print(f"{len(CASES)} cases, {DATA.stat().st_size} bytes")


if __name__ == "__main__":
    main()
