"""Figures reported with every verdict on numbers."""

from __future__ import annotations

import numpy as np

from dsv4_conformance.verdict.budget import unit
from dsv4_core.contract.dtypes import Host


def similarity_loss(got: Host, want: Host) -> float:
    """``1 - 2<x,y>/(|x|^2+|y|^2)``: 0 for equal arrays, sensitive to scale as cosine similarity is
    not.
    """
    norm = float(np.vdot(got, got) + np.vdot(want, want))
    return 0.0 if norm == 0 else 1 - 2 * float(np.vdot(got, want)) / norm


def bias(got: Host, want: Host, dtype: str) -> tuple[float, float]:
    """Mean signed error away from zero, in units of ``dtype``, and its standard error: rounding to
    nearest has none, truncation about -0.5.

    Rounding errors are spread evenly over one unit, deviation 12^-0.5, whatever few of them happen
    to show; equal values err equally, so that only different ones count.
    """
    if not want.size:
        return 0.0, float("inf")
    error = (got - want) * np.sign(want) / unit(np.abs(want), dtype)
    return float(error.mean()), float(max(error.std(), 12**-0.5) / np.sqrt(np.unique(want).size))


def largest_units(got: Host, want: Host, dtype: str) -> float:
    """The largest error in units in the last place of ``dtype`` at the wanted value."""
    return float(np.max(np.abs(got - want) / unit(np.abs(want), dtype), initial=0.0))
