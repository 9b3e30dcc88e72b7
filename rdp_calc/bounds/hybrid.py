"""Contraction after a prefix by shifted composition, at the best split (``docs/theory/contraction.md``)."""

from __future__ import annotations

from rdp_calc.bounds.contraction import Contraction, Split, _splits
from rdp_calc.errors import NotApplicable
from rdp_calc.methods import Method


class Hybrid(Contraction):
    """The first steps by shifted composition (whose mu gives delta at every epsilon), the rest by contraction:

        delta_j = delta(epsilon; mu_j) after j steps, then delta' = theta_e(D/tau) delta for the other K - j,

    at the best j in 0..K. Shifted composition may restart in any step from the diameter D of the set the step maps
    into. Never above contraction alone or shifted composition alone.

    Assumes: what contraction assumes, and for the prefix that the clipped gradient and the weight decay bound how far
    one step takes two runs apart: c = 1 - gamma lambda, s = 2 gamma C1.
    """

    name = "hybrid"
    id = "hockey-stick/hybrid/v1"
    summary = "Shifted composition for the first steps, contraction for the rest, best split."
    reference = "docs/theory/contraction.md; parts: arXiv:2403.00278, arXiv:1905.13229, arXiv:2012.11035"

    def check(self, method: Method) -> None:
        super().check(method)
        if method.prefix(1.0, 1) is None:
            raise NotApplicable("bound hybrid needs --grad-clip and --step-size.")

    def splits(self, method: Method) -> tuple[Split, ...]:
        found: tuple[Split, ...] = method.remember("splits", lambda: _splits(method))
        return found


BOUND = Hybrid()
