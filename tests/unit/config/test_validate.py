"""Value ranges and pairs of keys: each refusal names its key and a value that works."""

import pytest

from qurl.config.compose import compose
from qurl.config.validate import TRANSPORTS, validate
from qurl.errors import ConfigError

NEEDED = ["model.path=some/model", "data.train.path=some/data"]

REFUSED = [
    ("num_steps=0", "num_steps"),
    ("seed=-1", "seed"),
    ("seed=4294967296", "seed"),
    ("run_name=a/b", "run_name"),
    ("run_name=''", "run_name"),
    ("data.train.path=''", "data.train.path"),
    ("data.eval.a.split=test", "data.eval.a.path"),
    ("data.max_prompt_tokens=0", "data.max_prompt_tokens"),
    ("data.system_prompt=hello", "data.system_prompt"),
    ("algorithm.correction.truncation=0", "algorithm.correction.truncation"),
    ("algorithm.correction.truncation=nan", "algorithm.correction.truncation"),
    ("algorithm.correction.max_clip_scale=0.5", "algorithm.correction.max_clip_scale"),
    ("algorithm.correction.rejection_high=2", "algorithm.correction.rejection_high"),
    ("algorithm.entropy_coefficient=-0.1", "algorithm.entropy_coefficient"),
    ("algorithm.kl.placement=reward", "algorithm.kl.placement"),
    ("algorithm.policy_loss.aggregation=constant", "rollout.max_response_tokens"),
    ("algorithm.policy_loss.aggregation_constant=100", "algorithm.policy_loss.aggregation_constant"),
    ("algorithm.policy_loss.clip_low=-0.1", "algorithm.policy_loss.clip_low"),
    ("algorithm.policy_loss.clip_low=1.5", "algorithm.policy_loss.clip_low"),
    ("algorithm.policy_loss.clip_high=0", "algorithm.policy_loss.clip_high"),
    ("algorithm.policy_loss.dual_clip=1", "algorithm.policy_loss.dual_clip"),
    ("algorithm.kl.coefficient=-1", "algorithm.kl.coefficient"),
    ("algorithm.overlong.penalty_tokens=-1", "algorithm.overlong.penalty_tokens"),
    ("algorithm.overlong.penalty_tokens=1025", "at most 1024"),
    ("algorithm.dynamic_sampling.max_generations=0", "algorithm.dynamic_sampling.max_generations"),
    ("algorithm.dynamic_sampling.num_prompts_per_generation=0", "algorithm.dynamic_sampling.num_prompts_per_generation"),
    ("quantization.invariant_scale=0", "quantization.invariant_scale"),
    ("rollout.num_prompts_per_step=0", "rollout.num_prompts_per_step"),
    ("rollout.num_samples_per_prompt=1", "rollout.num_samples_per_prompt"),
    ("rollout.temperature=0", "rollout.temperature"),
    ("rollout.temperature=inf", "rollout.temperature"),
    ("rollout.top_p=0", "rollout.top_p"),
    ("rollout.top_p=1.1", "rollout.top_p"),
    ("rollout.top_k=0", "rollout.top_k"),
    ("rollout.max_staleness=-1", "rollout.max_staleness"),
    ("rollout.num_engines=0", "rollout.num_engines"),
    ("rollout.stop_token_ids=[-5]", "rollout.stop_token_ids"),
    ("rollout.engine_args.dtype=auto", "rollout.engine_args.dtype"),
    ("rollout.dtype=fp8", "rollout.dtype=fp8 cannot run; use auto or one of bfloat16, float16, float32"),
    ("rollout.engine_args.dtype=float8", "rollout.dtype"),
    ("rollout.engine_args.logits_processors=[a:B]", "the learner cannot follow it"),
    ("rollout.engine_args.override_generation_config={min_p: 0.1}", "rollout.temperature, top_p, top_k"),
    ("rollout.engine_args.watermark=true", "the learner cannot follow it"),
    ("probe.every_steps=-1", "probe.every_steps"),
    ("probe.num_samples=0", "probe.num_samples"),
    ("guard.max_kl=0", "guard.max_kl"),
    ("guard.max_ratio=1", "guard.max_ratio"),
    ("guard.max_repetition=nan", "guard.max_repetition"),
    ("guard.recovery_steps=0", "guard.recovery_steps"),
    ("guard.recovery_fraction=1.5", "guard.recovery_fraction"),
    ("guard.action=stop", "guard.max_kl"),
    ("learner.zero_stage=4", "learner.zero_stage"),
    ("learner.learning_rate=0", "learner.learning_rate"),
    ("learner.scaled_layers_multiplier=0", "learner.scaled_layers_multiplier"),
    ("learner.adam_betas=[0.9]", "learner.adam_betas"),
    ("learner.adam_betas=[0.9,1.0]", "learner.adam_betas"),
    ("learner.num_mini_batches=5", "1, 2, 4, 8, 16, 32"),
    ("learner.num_ranks=1000", "learner.num_ranks"),
    ("learner.max_tokens_per_micro_batch=2047", "2048"),
    ("critic.learning_rate=1e-4", "critic.learning_rate=0.0001 cannot run; use its default, or algorithm.advantage.name=gae"),
    ("critic.path=some/critic", "critic.path"),
    ("algorithm.advantage.discount=0.9", "algorithm.advantage.discount"),
    ("sync.transport=pigeon", "sync.transport"),
    ("rollout.engine_args.max_num_seqs=many", "rollout.engine_args.max_num_seqs"),
    ("rollout.engine_args.max_num_seqs=1.5", "rollout.engine_args.max_num_seqs"),
    ("rollout.engine_args.gpu_memory_utilization=1.5", "rollout.engine_args.gpu_memory_utilization"),
    ("rollout.engine_args.max_model_len=0", "rollout.engine_args.max_model_len"),
    ("sync.timeout_s=0", "sync.timeout_s"),
    ("sync.bucket_bytes=0", "sync.bucket_bytes"),
    ("sync.max_inflight_buckets=0", "sync.max_inflight_buckets"),
    ("reward.timeout_s=0", "reward.timeout_s"),
    ("reward.max_error_fraction=2", "reward.max_error_fraction"),
    ("evaluation.num_samples_per_prompt=4", "evaluation.num_samples_per_prompt"),
    ("checkpoint.keep_last=0", "checkpoint.keep_last"),
    ("cluster.stall_timeout_s=0", "cluster.stall_timeout_s"),
]

REFUSED_TOGETHER = [
    (["sync.delta=true", "sync.track_changes=false"], "sync.delta"),
    (["algorithm.correction.rejection=token", "algorithm.correction.rejection_low=6"], "algorithm.correction.rejection_low"),
    (["algorithm.correction.rejection=k3", "algorithm.correction.rejection_high=-1"], "algorithm.correction.rejection_high"),
    (["algorithm.correction.name=icepop", "algorithm.correction.rejection=k3"], "algorithm.correction.rejection"),
    (["algorithm.correction.name=icepop", "algorithm.correction.rejection_low=6"], "algorithm.correction.rejection_low"),
    (["algorithm=dr_grpo", "algorithm.policy_loss.aggregation_constant=0"], "algorithm.policy_loss.aggregation_constant"),
    (["algorithm=cispo", "algorithm.policy_loss.dual_clip=3"], "algorithm.policy_loss.dual_clip"),
    (["algorithm.advantage.name=rloo", "rollout.num_samples_per_prompt=1"], "rollout.num_samples_per_prompt"),
    (["stages=[{from_step:0,max_response_tokens:9}]"], "stages[0].from_step=0 cannot run; use a number > 0"),
    (
        ["stages=[{from_step:1520,max_response_tokens:9},{from_step:1040,max_response_tokens:8}]"],
        "stages[1].from_step=1040 cannot run; use a number > 1520: stages are listed in the order in which they begin",
    ),
    (["stages=[{from_step:5}]"], "stages[0]=from_step 5 cannot run; use one of num_prompts_per_step, num_samples_per_prompt"),
    (["stages=[{from_step:5,max_response_tokens:0}]"], "stages[0].max_response_tokens=0 cannot run; use a number >= 1"),
    (
        ["stages=[{from_step:5,max_response_tokens:8192}]"],
        "stages[0] (from iteration 5): learner.max_tokens_per_micro_batch=8192 cannot run; use at least 9216",
    ),
    (["stages=[{from_step:5,num_prompts_per_step:3}]", "learner.num_mini_batches=2"], "stages[0] (from iteration 5): learner.num"),
    (["algorithm=reinforce_plus_plus", "algorithm.overlong.filter=true"], "algorithm.overlong.filter"),
    (
        ["algorithm=reinforce_plus_plus", "algorithm.dynamic_sampling.enabled=true", "rollout.num_samples_per_prompt=1"],
        "rollout.num_samples_per_prompt",
    ),
    (
        ["algorithm.dynamic_sampling.enabled=true", "algorithm.dynamic_sampling.num_prompts_per_generation=3"],
        "algorithm.dynamic_sampling.max_generations=10 cannot run; use at least 11",
    ),
    (["algorithm=ppo", "algorithm.advantage.discount=1.1"], "algorithm.advantage.discount"),
    (["algorithm=ppo", "algorithm.advantage.gae_lambda=-1"], "algorithm.advantage.gae_lambda"),
    (["algorithm=ppo", "critic.learning_rate=0"], "critic.learning_rate"),
    (["algorithm=ppo", "critic.value_clip=0"], "critic.value_clip=0.0 cannot run; use null or a number > 0"),
    (["algorithm=ppo", "critic.num_warmup_iterations=100"], "critic.num_warmup_iterations=100 cannot run; use less than num_steps"),
    (["algorithm=ppo", "critic.num_warmup_iterations=-1"], "critic.num_warmup_iterations"),
    (["algorithm=ppo", "critic.revision=main"], "critic.revision"),
    (["algorithm=ppo", "critic.path=''"], "critic.path"),
    (["quantization=none", "quantization.ignore=[down_proj]"], "quantization.ignore"),
    (["quantization=int8", "quantization.precision=k2-w2-a2"], "quantization.precision=k2-w2-a2 cannot run; use null, or quant"),
    (["quantization=axbxp", "quantization.precision=3"], "quantization.precision=3 cannot run; use a setting such as"),
    (["quantization=axbxp", "quantization.precision={down_proj:3}"], "quantization.precision"),
    (["quantization=axbxp", "quantization.precision={}"], "quantization.precision"),
    (["quantization=none", "guard.action=full_precision", "guard.max_kl=0.1"], "guard.action"),
    (
        ["quantization=none", "guard.action=raise_precision", "guard.max_kl=0.1"],
        "guard.action=raise_precision cannot run; use warn or stop with quantization=none",
    ),
    (
        ["quantization=axbxp_k2l2", "guard.action=raise_precision", "guard.max_kl=0.1"],
        "guard.action=raise_precision cannot run; use quantization=axbxp with it, or full_precision with quantization=axbxp_k2l2",
    ),
    (["quantization=axbxp", "guard.action=raise_precision"], "guard.action=raise_precision cannot run; use guard.max_kl"),
    (["quantization=none", "quantization.update_awareness=invariant_scaling"], "quantization.update_awareness"),
    (["quantization=none", "quantization.update_awareness=stochastic_rounding"], "quantization.update_awareness"),
    (["cluster=cpu", "sync.transport=nccl"], "sync.transport"),
    (["cluster=cpu", "cluster.colocate=true"], "cluster.colocate"),
    (["cluster=gpu_colocated", "sync.transport=nccl"], "sync.transport"),
    (["cluster=gpu", "sync.transport=cuda_ipc"], "sync.transport"),
    (["cluster=gpu_colocated", "rollout.max_staleness=1"], "rollout.max_staleness"),
    (["cluster=gpu_colocated", "rollout.num_engines=2"], "rollout.num_engines"),
]


def test_the_defaults_validate() -> None:
    assert validate(compose(NEEDED)) is None  # raises ConfigError for what cannot run


@pytest.mark.parametrize(("override", "told"), REFUSED)
def test_a_value_out_of_range_is_refused_by_its_key(override: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(compose([*NEEDED, override]))
    assert told in str(caught.value)
    assert "use " in str(caught.value)


@pytest.mark.parametrize(("overrides", "told"), REFUSED_TOGETHER)
def test_a_pair_that_contradicts_itself_is_refused(overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(compose([*NEEDED, *overrides]))
    assert str(caught.value).startswith(told)


def test_what_needs_no_group_runs_with_one_sample_per_prompt() -> None:
    for algorithm in ("reinforce_plus_plus", "ppo"):
        one = compose([*NEEDED, f"algorithm={algorithm}", "rollout.num_samples_per_prompt=1"])
        assert validate(one) is None  # raises ConfigError for what cannot run


def test_the_transports_are_those_that_exist() -> None:
    from qurl.sync import TRANSPORTS as IMPLEMENTED

    assert set(TRANSPORTS) == {"auto", *IMPLEMENTED}


def test_a_stage_changes_what_it_names_and_keeps_what_the_stage_before_it_changed() -> None:
    stages = "stages=[{from_step:3,max_response_tokens:2048,num_samples_per_prompt:16},{from_step:5,max_response_tokens:512}]"
    config = compose([*NEEDED, stages, "data.max_prompt_tokens=100"])
    validate(config)
    assert [config.stage_at(step) for step in range(7)] == [0, 0, 0, 1, 1, 2, 2]
    found = [(rollout.max_response_tokens, rollout.num_samples_per_prompt) for rollout in map(config.rollout_at, (2, 3, 4, 5, 99))]
    assert found == [(1024, 8), (2048, 16), (2048, 16), (512, 16), (512, 16)]
    assert (config.longest_rollout_tokens, config.longest_tokens) == (2048, 2148)
    config.evaluation.max_response_tokens = 3000
    assert config.longest_tokens == 3100
