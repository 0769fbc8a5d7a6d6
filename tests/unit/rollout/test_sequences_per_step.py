"""Pool, plan and engine count the same number of sequences in a step."""

import pytest
from vllm import EngineArgs

from qurl.config import ModelConfig, QuantizationConfig, RolloutConfig
from qurl.rollout import vllm_engine
from qurl.rollout.pool import ROOM, RolloutPool
from qurl.warmstart.model import make_tiny_model


@pytest.mark.parametrize(
    ("asked", "sequences", "tokens"),
    [
        ({}, 256, 2048),
        ({"max_num_seqs": 8}, 8, 2048),
        ({"max_num_seqs": 4096}, 4096, 4096),
        ({"max_num_batched_tokens": 64}, 64, 64),
        ({"max_num_seqs": 32, "max_num_batched_tokens": 512}, 32, 512),
    ],
)
def test_the_engine_is_given_what_the_pool_and_the_plan_count(monkeypatch, tmp_path_factory, asked, sequences, tokens):
    given = {}

    def engine_args(**arguments):
        given.update(arguments)
        raise InterruptedError  # no engine is needed

    monkeypatch.setattr("vllm.EngineArgs", engine_args)
    folder = tmp_path_factory.getbasetemp() / "tiny"
    if not folder.exists():
        make_tiny_model(folder)
    rollout = RolloutConfig(engine_args=asked)
    with pytest.raises(InterruptedError):
        vllm_engine.build_engine(ModelConfig(path=str(folder)), rollout, QuantizationConfig(), max_model_len=64, seed=0)
    assert (given["max_num_seqs"], given["max_num_batched_tokens"]) == (sequences, tokens)
    assert (rollout.max_num_seqs, rollout.max_num_batched_tokens("cpu")) == (sequences, tokens)  # the plan's
    pool = RolloutPool(rollout, lambda engine_id: None, run_seed=0, decode=str)
    assert pool._max_load == int(ROOM * sequences)
    assert {"max_num_seqs", "max_num_batched_tokens"} <= set(EngineArgs.__dataclass_fields__)
