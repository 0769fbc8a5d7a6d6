"""The DeepSpeed JSON: merged where it may be, refused where it conflicts."""

import pytest

from qurl.config import LearnerConfig
from qurl.learner.deepspeed_config import OWNED, deepspeed_config


def nested(dotted, value):
    head, _, rest = dotted.partition(".")
    return {head: nested(rest, value) if rest else value}


@pytest.mark.parametrize("key", OWNED)
def test_a_key_that_the_learner_controls_is_refused_by_name(key):
    with pytest.raises(ValueError, match=rf"learner\.deepspeed\.{key} conflicts"):
        deepspeed_config(LearnerConfig(deepspeed=nested(key, 1)), 10)


def test_other_keys_are_merged_deeply():
    config = LearnerConfig(zero_stage=2, deepspeed={"zero_optimization": {"overlap_comm": False}, "wall_clock_breakdown": True})
    merged = deepspeed_config(config, 10)
    assert merged["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 10, "overlap_comm": False}
    assert merged["wall_clock_breakdown"] is True


def test_a_stage_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"learner\.zero_stage=4"):
        deepspeed_config(LearnerConfig(zero_stage=4), 10)
