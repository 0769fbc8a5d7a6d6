"""What every advantage, correction and policy loss must keep, those of this project and those of a user."""

import math
import pickle
import subprocess
import sys

import pytest
import torch

from qurl.algorithms import ADVANTAGES, CORRECTIONS, POLICY_LOSSES, CorrectionInputs, PolicyLossInputs, RewardedGroup
from qurl.config import AdvantageConfig, CorrectionConfig, PolicyLossConfig
from qurl.config.algorithm import GAE
from qurl.observability.metrics import Metric, reduce_metrics
from qurl.plug import resolve

USER_MODULE = """
from qurl.algorithms import LossOutput, grpo
from qurl.algorithms.corrections import tis

def advantage(groups, config):
    return [[2 * a for a in group] for group in grpo(groups, config)]

def correction(inputs, config):
    return tis(inputs, config)

def policy_loss(inputs, config):
    return LossOutput(loss=(-inputs.weights * inputs.advantages * inputs.logprobs).masked_fill(~inputs.mask, 0.0), metrics={})
"""


SEGMENT_IDS = torch.tensor([[0, 0, 1, 1], [2, 2, 2, -1]])


@pytest.fixture(autouse=True)
def user_module(tmp_path, monkeypatch):
    (tmp_path / "my_algorithms.py").write_text(USER_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("my_algorithms", None)


def batch():
    g = torch.Generator().manual_seed(0)
    mask = torch.tensor([[False, True, True, True], [False, False, True, False]])
    rollout, noise, drift, advantages = (torch.randn(2, 4, generator=g) for _ in range(4))
    return rollout + noise, rollout, rollout + noise + 0.1 * drift, advantages, mask


def mismatch(old, rollout, mask):
    return CorrectionInputs(old_logprobs=old, rollout_logprobs=rollout, mask=mask, segment_ids=SEGMENT_IDS)


@pytest.mark.parametrize("name", [*ADVANTAGES, "my_algorithms:advantage"])
def test_an_advantage_gives_one_finite_number_per_rollout_and_zeros_where_all_rewards_are_equal(name):
    advantage = resolve(ADVANTAGES, name, "algorithm.advantage.name")
    groups = [RewardedGroup(rewards=[0.0, 1.0, 1.0], lengths=[5, 2, 9]), RewardedGroup(rewards=[], lengths=[])]
    groups.append(RewardedGroup(rewards=[1.0, 0.0], lengths=[3, 4]))
    result = advantage(groups, AdvantageConfig())
    assert [len(group) for group in result] == [3, 0, 2] and all(math.isfinite(a) for group in result for a in group)
    assert result[0][0] < result[0][1] == result[0][2] and result[2][1] < result[2][0]
    if name == GAE:
        return  # its baseline is the learner's critic
    assert result[0][0] < 0 < result[0][1] and result[2][1] < 0 < result[2][0]
    assert advantage([RewardedGroup(rewards=[1.0, 1.0], lengths=[5, 2])], AdvantageConfig()) == [[0.0, 0.0]]


@pytest.mark.parametrize("name", [*CORRECTIONS, "my_algorithms:correction"])
def test_a_correction_is_finite_without_gradient_and_blind_to_masked_tokens(name):
    correction = resolve(CORRECTIONS, name, "algorithm.correction.name")
    old, rollout, _, _, mask = batch()
    result = correction(mismatch(old, rollout, mask), CorrectionConfig())
    nan = torch.full_like(old, math.nan)
    again = correction(mismatch(torch.where(mask, old, nan), torch.where(mask, rollout, nan), mask), CorrectionConfig())
    for field in ("base_logprobs", "weights", "clip_high_scale"):
        tensor = getattr(result, field)
        assert tensor.shape == old.shape and tensor.isfinite().all() and not tensor.requires_grad
        assert torch.equal(tensor[mask], getattr(again, field)[mask])
    assert (result.weights >= 0).all() and (result.clip_high_scale >= 1).all()
    assert result.keep_mask.dtype == torch.bool and not (result.keep_mask & ~mask).any()
    assert result.metrics == again.metrics
    assert all(isinstance(m, Metric) for m in pickle.loads(pickle.dumps(result.metrics)).values())
    assert reduce_metrics([result.metrics, result.metrics]) == pytest.approx(reduce_metrics([result.metrics]))


@pytest.mark.parametrize("name", [*POLICY_LOSSES, "my_algorithms:policy_loss"])
def test_a_policy_loss_raises_good_tokens_lowers_bad_ones_and_ignores_masked_ones(name):
    policy_loss = resolve(POLICY_LOSSES, name, "algorithm.policy_loss.name")
    old, rollout, logprobs, advantages, mask = batch()
    c = CORRECTIONS["tis"](mismatch(old, rollout, mask), CorrectionConfig())
    logprobs = c.base_logprobs.clone().requires_grad_()
    output = policy_loss(PolicyLossInputs(logprobs=logprobs, base_logprobs=c.base_logprobs, advantages=advantages, mask=mask,
                                          weights=c.weights, clip_high_scale=c.clip_high_scale, segment_ids=SEGMENT_IDS),
                         PolicyLossConfig())
    (gradient,) = torch.autograd.grad(output.loss.sum(), logprobs)
    assert output.loss.shape == mask.shape and (output.loss[~mask] == 0).all() and (gradient[~mask] == 0).all()
    assert torch.equal(gradient[mask].sign(), -advantages[mask].sign())
    reduce_metrics([output.metrics])


@pytest.mark.parametrize("table", [ADVANTAGES, CORRECTIONS, POLICY_LOSSES])
def test_an_unknown_name_is_refused_with_the_known_ones(table):
    with pytest.raises(ValueError, match=next(iter(table))):
        resolve(table, "no_such_entry", "algorithm.x.name")


def test_algorithms_import_where_only_torch_is_installed():
    heavy = ["vllm", "ray", "deepspeed", "transformers", "rich", "wandb", "matplotlib", "hydra", "omegaconf", "yaml"]
    code = f"import sys; sys.modules.update(dict.fromkeys({heavy!r})); import qurl.algorithms, qurl.observability.metrics"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
