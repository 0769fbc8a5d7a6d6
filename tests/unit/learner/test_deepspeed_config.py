"""The DeepSpeed JSON: merged where it may be, refused where it conflicts."""

import pytest

from qurl.config import LearnerConfig
from qurl.learner.deepspeed_config import OWNED, deepspeed_config, known_deepspeed_keys


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


@pytest.mark.parametrize(
    ("stage", "offload", "told"),
    [
        (0, {"offload_optimizer": {"device": "cpu"}}, r"offload_optimizer needs learner\.zero_stage=1 or more; found 0"),
        (2, {"offload_param": {"device": "cpu"}}, r"offload_param needs learner\.zero_stage=3 or more; found 2"),
        (3, {"offload_optimizer": {"device": "gpu"}}, r"offload_optimizer\.device=gpu does not exist; use one of none, cpu, nvme"),
    ],
)
def test_an_offload_that_would_not_happen_is_refused(stage, offload, told):
    with pytest.raises(ValueError, match=told):
        deepspeed_config(LearnerConfig(zero_stage=stage, deepspeed={"zero_optimization": offload}), 10)


def test_a_stage_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"learner\.zero_stage=4"):
        deepspeed_config(LearnerConfig(zero_stage=4), 10)


def test_deepspeed_s_own_keys_are_known_and_typos_are_not():
    assert {key.partition(".")[0] for key in OWNED} <= known_deepspeed_keys() | {"managed_gradient_accumulation"}
    some = {"zero_optimization", "aio", "activation_checkpointing", "wall_clock_breakdown", "flops_profiler", "data_types"}
    assert some <= known_deepspeed_keys()
    assert not {"zero_optimisation", "foo", "wall_clock_break_down"} & known_deepspeed_keys()
