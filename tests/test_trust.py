"""Trust in the PRM: a running count of pairs, and the weight that it gives process rewards."""

import pytest

from trl_prime.implicit_prm.trust import Trust


def test_a_prm_that_nobody_has_measured_is_not_trusted():
    assert Trust().weight == 0.0 and (Trust().wins, Trust().pairs) == (8.0, 16.0)


# Weights by hand: accuracy a, its standard error e = sqrt(max(a * (1 - a), 0.09) / pairs), 2 * (a - 1.5 * e) - 1
@pytest.mark.parametrize(
    ("wins", "pairs", "weight"),
    [
        (8.0, 16.0, 0.0),
        (12.0, 16.0, 0.1752404735808356),  # a = 0.75, e = 0.10825
        (64.0, 100.0, 0.136),  # a = 0.64, e = 0.048
        (96.0, 100.0, 0.83),  # a = 0.96, of which the variance is no more than that of 0.9: e = 0.03
        (1.0, 1.0, 0.1),  # a = 1, e = 0.3
        (20.0, 100.0, 0.0),
    ],
)
def test_weight(wins, pairs, weight):
    assert Trust(wins, pairs).weight == pytest.approx(weight, abs=1e-12)


def test_the_past_counts_less_and_a_batch_without_pairs_not_at_all():
    trust = Trust(10.0, 20.0)
    trust.add(3.0, 4)
    assert (trust.wins, trust.pairs) == pytest.approx((12.0, 22.0))
    trust.add(0.0, 0)
    assert (trust.wins, trust.pairs) == pytest.approx((12.0, 22.0))
