"""DP-SGD for a group from the profile of one record, by generic group privacy (``docs/theory/group-generic.md``)."""

from __future__ import annotations

import math

from rdp_calc.bounds.pld import LossDistributionBound
from rdp_calc.methods.dp_sgd import DpSgd


class GroupGeneric(LossDistributionBound):
    """If one record is (e, d)-indistinguishable, a group of k is (k e, d (e^{k e} - 1)/(e^e - 1))-indistinguishable:
    records go one after another and the divergences chain. Used with e = epsilon / k and the exact profile of one
    record by privacy-loss distributions; never better than that of the group (bound pld), and here for comparison.

    Assumes: what bound pld assumes. Both directions hold, because they hold for one record.
    """

    name = "group-generic"
    id = "dp-sgd/group-generic/v1"
    summary = "Profile of one record, turned into a group's by generic group privacy; for comparison."
    reference = "Vadhan 2017, Lemma 2.2; Ganesh 2024, arXiv:2401.10294"

    def accounted_group(self, method: DpSgd) -> int:
        return 1

    def at(self, method: DpSgd, epsilon: float) -> tuple[float, float]:
        if method.group_size == 1:
            return epsilon, 0.0
        if epsilon == 0:
            return 0.0, math.log(method.group_size)
        # Rounded down, so that k steps of it stay below epsilon.
        each = math.nextafter(epsilon / method.group_size, 0.0)
        log_factor = epsilon - each + math.log(-math.expm1(-epsilon)) - math.log(-math.expm1(-each))
        return each, log_factor + 1e-13 * (1 + abs(log_factor))


BOUND = GroupGeneric()
