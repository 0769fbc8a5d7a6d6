import pytest
from hypothesis import given
from hypothesis import strategies as st

from qurl.observability.metrics import EffectiveSampleSize, Last, Max, Mean, Min, Sum, reduce_metrics

SHARES = st.lists(st.lists(st.floats(0.01, 100), max_size=6), min_size=1, max_size=5)


def sample_size(weights):
    count = max(len(weights), 1)
    return EffectiveSampleSize.of(sum(weights) / count, sum(w * w for w in weights) / count, len(weights))


@given(SHARES)
def test_effective_sample_sizes_of_shares_join_to_that_of_the_whole(shares):
    whole = [w for share in shares for w in share]
    expected = sum(whole) ** 2 / (len(whole) * sum(w * w for w in whole)) if whole else 0.0
    joined = reduce_metrics([{"mismatch/ess_fraction": sample_size(share)} for share in shares])
    assert joined["mismatch/ess_fraction"] == pytest.approx(expected, rel=1e-9)


@given(SHARES)
def test_means_of_shares_join_to_the_mean_of_the_whole(shares):
    whole = [w for share in shares for w in share]
    reports = [{"policy/loss": Mean(sum(s) / max(len(s), 1), weight=len(s))} for s in shares]
    assert reduce_metrics(reports)["policy/loss"] == pytest.approx(sum(whole) / len(whole) if whole else 0.0, rel=1e-9)


@pytest.mark.parametrize("kind, expected", [(Sum, 6.0), (Max, 3.0), (Min, 1.0), (Last, 2.0)])
def test_each_type_reduces_in_its_own_way(kind, expected):
    assert reduce_metrics([{"policy/tokens": kind(v)} for v in (1.0, 3.0, 2.0)]) == {"policy/tokens": expected}


def test_a_key_reported_with_two_types_is_refused():
    with pytest.raises(TypeError, match="policy/loss"):
        reduce_metrics([{"policy/loss": Mean(1.0)}, {"policy/loss": Max(1.0)}])


def test_a_key_outside_of_the_table_is_refused():
    with pytest.raises(KeyError, match="policy/lost"):
        reduce_metrics([{"policy/lost": Mean(1.0)}])
