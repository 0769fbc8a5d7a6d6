"""Plans: arithmetic by hand, refusals by key."""

import dataclasses
import math
from pathlib import Path

import pytest

from qurl.config.compose import compose
from qurl.config.placement import place
from qurl.config.validate import validate
from qurl.errors import ConfigError
from qurl.hardware import Gpu, Hardware, engine_dtype
from qurl.plan import make_plan
from qurl.plan.memory import wire_bytes
from qurl.plan.preflight import check_model
from qurl.quantization.lobcq import Codebooks, Layout
from qurl.quantization.lobcq.codebooks import save_codebooks

GIB = 1 << 30
LAPTOP = Hardware(
    cpu_name="cpu", cpu_flags=frozenset(), num_cores=8, memory_bytes=64 * GIB, shm_bytes=32 * GIB, gpus=()
)  # fmt: skip


def with_gpus(count: int, gib: int = 80, capability: tuple[int, int] = (9, 0)) -> Hardware:
    gpu = Gpu(name="gpu", memory_bytes=gib * GIB, capability=capability)
    return dataclasses.replace(LAPTOP, gpus=(gpu,) * count)


def plan(overrides: list[str], machine: Hardware = LAPTOP):
    config = compose(overrides)
    validate(config)
    return make_plan(config, machine)


def test_batch_arithmetic(needed: list[str]) -> None:
    batch = plan([*needed, "learner.num_mini_batches=4", "learner.num_ranks=3", "num_steps=10"]).batch
    assert (batch.num_samples, batch.num_samples_per_mini_batch, batch.num_samples_per_rank) == (256, 64, 22)
    assert (batch.longest_tokens, batch.max_tokens) == (128, 256 * 128)
    assert batch.max_micro_batches == 11  # two samples of 128 tokens in 256
    assert batch.num_optimizer_steps == 40


def test_a_guard_that_falls_back_plans_engines_that_hold_full_precision(needed: list[str]) -> None:
    falls_back = plan([*needed, "quantization=int8", "guard.action=full_precision", "guard.max_kl=0.01"])
    int8, none = (plan([*needed, f"quantization={name}"]) for name in ("int8", "none"))
    assert int8.engine.weights < none.engine.weights == falls_back.engine.weights
    assert falls_back.wire_bytes == int8.wire_bytes


def test_a_guard_that_raises_the_precision_plans_no_more_memory(needed: list[str]) -> None:
    axbxp = [*needed, "quantization=axbxp", "guard.max_kl=0.01"]
    raises, warns = (plan([*axbxp, f"guard.action={action}"]) for action in ("raise_precision", "warn"))
    assert (raises.engine, raises.wire_bytes) == (warns.engine, warns.wire_bytes)


BY_LAYER = ",".join(f"{name}_proj:k3-w3-a3-balanced" for name in ("q", "k", "v", "o", "gate", "up", "down"))


@pytest.mark.parametrize("precision", ["k4-w2-a2", "k2-w4-a4", f"{{{BY_LAYER}}}"])
def test_a_precision_of_all_blocks_cannot_be_raised(needed: list[str], precision: str) -> None:
    raised = [*needed, "quantization=axbxp", "guard.action=raise_precision", "guard.max_kl=0.01"]
    with pytest.raises(ConfigError, match=r"raise_precision cannot run: quantization.precision=.* keeps all .*k2-w2g16-a3g1"):
        plan([*raised, f"quantization.precision={precision}"])
    plan([*raised, "quantization.precision={down_proj:k4-w2-a2}"])  # the other layers drop some
    plan([*raised, "quantization.precision=k4-w2-a2-noll"])


def test_on_a_gpu_only_what_captured_graphs_allow_can_be_raised(needed: list[str]) -> None:
    raised = [*needed, "quantization=axbxp", "guard.action=raise_precision", "guard.max_kl=0.01"]
    on_gpus = [*raised, "cluster.device=cuda"]
    plan(on_gpus, with_gpus(2))
    for precision in ("k2-w2-a2g16", "k4-w2-a2-noll"):
        plan([*raised, f"quantization.precision={precision}"])
        with pytest.raises(ConfigError, match=f"cannot change from quantization.precision={precision} to k4-w2-a2; use "):
            plan([*on_gpus, f"quantization.precision={precision}"], with_gpus(2))


def test_the_codebooks_of_a_file_are_checked_and_their_bits_counted(needed: list[str], tmp_path: Path) -> None:
    asked = [*needed, "quantization=lobcq", f"quantization.codebooks={tmp_path / 'books.json'}"]
    book = tuple(range(-15, 16, 2))

    def given(layout: Layout) -> list[str]:
        save_codebooks(Codebooks(layout=layout, entries=(book,) * layout.num_codebooks), tmp_path / "books.json", "by hand")
        return asked

    own, package = plan(given(Layout(block=4, array=32, num_codebooks=8))), plan([*needed, "quantization=lobcq"])
    assert 1.0 < own.wire_bytes / package.wire_bytes < 5.0 / 4.625  # bits per weight; embeddings and norms have 32
    for planned in (own, package):  # multiplied as they are on the wire
        assert planned.engine.weights == planned.wire_bytes
        assert not any("lobcq is emulated" in warning for warning in planned.warnings)
    with pytest.raises(ValueError, match="model.layers.*: quantization=lobcq needs a multiple of 128 input features, not 64"):
        plan(given(Layout(array=128)))
    with pytest.raises(ValueError, match="quantization.codebooks has codewords of 8 bits"):
        plan(given(Layout(codeword_bits=8)))
    with pytest.raises(ValueError, match="quantization.codebooks needs quantization=lobcq"):
        plan([*given(Layout()), "quantization=int8"])


def test_parameters_and_wire_bytes_match_the_real_model_and_its_encoding(needed: list[str], model_dir: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from qurl.quantization import FORMATS, select_targets

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir))
    linear = [name for name, module in model.named_modules() if type(module).__name__ == "Linear"]
    found = plan([*needed, "quantization=none"])
    assert found.model.num_parameters == sum(p.numel() for p in model.parameters())
    assert found.wire_bytes == 2 * found.model.num_parameters
    config = compose(needed)
    for name in sorted(FORMATS.keys() - {"none", "int4"}):  # whose groups are longer than this model is wide
        config.quantization.format = name
        targets = select_targets(linear, [])
        expected = 0
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.removesuffix(".weight") in targets:
                expected += sum(tensor.nbytes for tensor in FORMATS[name].encode(parameter.detach()).values())
            else:
                expected += 2 * parameter.numel()
        assert wire_bytes(config, found.model, targets) == expected, name


def test_a_layer_that_the_format_cannot_encode_is_refused_by_name(needed: list[str]) -> None:
    message = r"mlp\.gate_proj: quantization=int4 needs a multiple of 128 input features, not 64; .*quantization\.ignore"
    with pytest.raises(ConfigError, match=message):
        plan([*needed, "quantization=int4"])
    assert plan([*needed, "quantization=int4", "quantization.ignore=['re:.*(proj)(?<!down_proj)']"]).num_quantized_modules == 2


def test_an_engine_holds_formats_of_four_bits_in_four_bytes_a_weight_and_the_plan_says_so(needed: list[str]) -> None:
    planned, plain = (plan([*needed, f"quantization={name}"]) for name in ("nvfp4", "none"))
    quantized = sum(math.prod(shape) for name, shape in plain.model.parameters.items() if name.endswith("_proj.weight"))
    assert planned.wire_bytes < plain.wire_bytes - quantized
    assert abs(planned.engine.weights - (plain.engine.weights + 2 * quantized)) <= 1
    assert any("nvfp4 is emulated" in warning for warning in planned.warnings)


def test_an_engine_of_ax_bxp_holds_int8_and_beside_it_the_codes_of_the_wire_or_packed_ones_as_they_are(needed: list[str]) -> None:
    names = ("int8", "axbxp", "axbxp_k2l2")
    int8, axbxp, packed = (plan([*needed, f"quantization={name}"]) for name in names)
    quantized = sum(math.prod(shape) for name, shape in int8.model.parameters.items() if name.endswith("_proj.weight"))
    assert axbxp.wire_bytes == int8.wire_bytes > packed.wire_bytes
    assert axbxp.engine.weights == int8.engine.weights + quantized and packed.engine.weights == packed.wire_bytes
    on_gpu = plan([*needed, "quantization=axbxp_k2l2", "cluster=gpu"], with_gpus(8))
    assert on_gpu.engine.weights == int8.wire_bytes  # where it is expanded


def test_zero_stages_shard_what_they_say(needed: list[str]) -> None:
    memory = {
        stage: plan([*needed, "learner.num_ranks=4", "learner.dtype=bfloat16", f"learner.zero_stage={stage}"]).learner
        for stage in range(4)
    }
    size = memory[0].weights // 2
    assert [memory[s].weights for s in range(4)] == [2 * size] * 3 + [2 * size // 4]
    assert [memory[s].gradients for s in range(4)] == [4 * size] * 2 + [size] * 2
    assert [memory[s].optimizer for s in range(4)] == [3 * size] * 4  # bfloat16 at stage 0 runs as stage 1


OFFLOADED = "learner.deepspeed.zero_optimization.offload_optimizer.device=cpu"


@pytest.mark.parametrize(
    ("stage", "on_device", "on_host"),  # bytes a parameter: (weights, gradients, optimizer), and all of what is offloaded
    [(1, (2, 4, 0), (12 + 4 + 2 + 2) / 4), (2, (2, 0, 0), (12 + 4 + 2 + 2) / 4), (3, (2 / 4, 0, 0), (12 + 4 + 4) / 4)],
)
def test_an_offloaded_optimizer_is_counted_on_the_host(needed: list[str], stage: int, on_device: tuple, on_host: float) -> None:
    ranks = ["learner.num_ranks=4", "learner.dtype=bfloat16", f"learner.zero_stage={stage}", "quantization=none"]
    there, here = (plan([*needed, *ranks, *more], with_gpus(8)) for more in (["cluster=gpu"], ["cluster=gpu", OFFLOADED]))
    size, memory = there.model.num_parameters, here.learner
    assert (memory.weights, memory.gradients, memory.optimizer) == tuple(size * n for n in on_device)
    assert memory.offloaded == size * on_host
    assert here.host_bytes - there.host_bytes == 4 * memory.offloaded


def test_offloaded_weights_are_counted_on_the_host_too(needed: list[str]) -> None:
    parameters = "learner.deepspeed.zero_optimization.offload_param.device=cpu"
    ranks = [*needed, "learner.num_ranks=2", "learner.dtype=bfloat16", "learner.zero_stage=3", OFFLOADED]
    plain, offloaded = (plan([*ranks, *more], LAPTOP).learner for more in ([], [parameters]))
    assert (offloaded.weights, offloaded.offloaded) == (0, plain.offloaded + plain.weights)


def test_zero_3_shards_the_reference_and_gathers_what_others_hold(needed: list[str]) -> None:
    options = [*needed, "algorithm=grpo_kl", "learner.num_ranks=4"]
    whole, sharded = (plan([*options, f"learner.zero_stage={stage}"]).learner for stage in (2, 3))
    assert (whole.gathered, sharded.gathered) == (0, whole.weights)
    assert (whole.reference, sharded.reference) == (whole.weights, whole.weights // 4)
    assert sharded.while_starting > sharded.while_training - sharded.activations - sharded.logits - sharded.gathered


def test_a_described_cluster_is_judged_node_by_node(needed: list[str]) -> None:
    many = [*needed, "cluster=ray", "learner.num_ranks=16", "rollout.num_engines=16"]
    nodes = dataclasses.replace(with_gpus(8), num_nodes=4)
    with pytest.raises(ConfigError, match="need 32 GPUs, 24 found"):
        plan(many, dataclasses.replace(nodes, num_nodes=3))
    with pytest.raises(ConfigError, match="of a node's 1.0 GiB memory"):
        plan(many, dataclasses.replace(nodes, memory_bytes=GIB))
    found = plan(many, nodes)
    assert not any("not judged" in warning for warning in found.warnings)
    one_node = plan([*needed, "cluster=gpu", "learner.num_ranks=8", "learner.zero_stage=0"], with_gpus(9))
    assert found.host_bytes == pytest.approx(one_node.host_bytes, rel=0.2)  # eight ranks, or eight and an engine


def test_an_engine_stays_on_a_node(needed: list[str]) -> None:
    machine = dataclasses.replace(with_gpus(1), num_nodes=4)
    with pytest.raises(ConfigError, match=r"rollout\.tensor_parallel_size=2: .* whose GPUs are 1"):
        plan([*needed, "cluster=gpu", "rollout.tensor_parallel_size=2"], machine)


def test_a_stage_has_its_own_batch_and_cache(needed: list[str]) -> None:
    stages = "stages=[{from_step:5,num_samples_per_prompt:4},{from_step:9,max_response_tokens:128,num_prompts_per_step:16}]"
    found = plan([*needed, stages, "num_steps=20"])
    assert [stage.from_step for stage in found.stages] == [5, 9]
    batches = [found.batch, *(stage.batch for stage in found.stages)]
    assert [(b.num_prompts, b.num_samples, b.longest_tokens) for b in batches] == [(32, 256, 128), (32, 128, 128), (16, 64, 192)]
    engines = [found.engine, *(stage.engine for stage in found.stages)]
    per_token = 2 * 2 * 2 * 32 * 2  # k and v, layers, heads, head size, bytes
    assert [engine.kv_all for engine in engines] == [256 * 128 * per_token, 128 * 128 * per_token, 64 * 192 * per_token]


def test_positions_beyond_those_of_the_model_are_accepted_where_the_configuration_says_so(needed: list[str]) -> None:
    longer = [*needed, "rollout.max_response_tokens=1000", "learner.max_tokens_per_micro_batch=2000"]
    found = plan([*longer, "model.max_position_embeddings=1064"])
    assert (found.model.max_position_embeddings, found.batch.longest_tokens) == (1064, 1064)


def test_tracking_updates_keeps_the_quantized_weights_in_float32_on_the_host(needed: list[str]) -> None:
    plain, tracking = (plan([*needed, "quantization=int8", f"sync.track_updates={value}"]) for value in ("false", "true"))
    model = plain.model
    quantized = sum(math.prod(shape) for name, shape in model.parameters.items() if name.endswith("_proj.weight"))
    assert (plain.learner.previous_weights, tracking.learner.previous_weights) == (0, 4 * quantized)
    assert tracking.host_bytes - plain.host_bytes == 4 * quantized


def test_cache_of_a_sequence_is_layers_times_heads_times_tokens(needed: list[str]) -> None:
    engine = plan(needed).engine
    assert engine.kv_per_sequence == 2 * 2 * 2 * 32 * 128 * 2  # k and v, layers, heads, head size, tokens, bytes
    assert engine.kv_all == 256 * engine.kv_per_sequence


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], (8, 8)),
        (["rollout.num_engines=2", "learner.num_ranks=4"], (4, 2)),
        (["rollout.max_staleness=1"], (4, 4)),
        (["rollout.max_staleness=1", "rollout.num_engines=2", "learner.num_ranks=2"], (2, 2)),
        (["rollout.max_staleness=1", "rollout.num_engines=16", "learner.num_ranks=16"], (1, 1)),
        (["cluster.engine_threads=3"], (3, 8)),
    ],
)
def test_threads_stay_within_the_cores(needed: list[str], overrides: list[str], expected: tuple[int, int]) -> None:
    found = place(compose([*needed, *overrides]), num_gpus=0, num_cores=8)
    assert (found.engine_threads, found.learner_threads) == expected


def test_oversubscribed_cores_are_noted(needed: list[str]) -> None:
    assert any("compete" in note for note in plan([*needed, "rollout.num_engines=16"]).warnings)


def test_fp8_on_a_processor_is_noted_as_emulated(needed: list[str]) -> None:
    assert any("emulated" in note for note in plan([*needed, "quantization=fp8"]).warnings)


def test_gpu_shares(needed: list[str]) -> None:
    gpu = [*needed, "cluster=gpu", "rollout.tensor_parallel_size=2", "sync.transport=shared_memory"]
    found = plan(gpu, with_gpus(3)).placement
    assert (found.device, found.gpus_per_engine, found.gpus_per_rank) == ("cuda", 2.0, 1.0)
    shared = plan([*needed, "cluster=gpu_colocated", "rollout.engine_args.gpu_memory_utilization=0.5"], with_gpus(1)).placement
    assert (shared.gpus_per_engine, shared.gpus_per_rank) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("overrides", "machine", "told"),
    [
        (["algorithm.correction.name=tsi"], LAPTOP, "algorithm.correction.name"),
        (["algorithm.advantage.name=gea"], LAPTOP, "use one of dr_grpo, gae, grpo"),
        (["algorithm.policy_loss.name=nope"], LAPTOP, "algorithm.policy_loss.name"),
        (["algorithm.correction.name=os.path:dirname"], LAPTOP, "name='os.path:dirname' cannot be called with"),
        (["algorithm.advantage.name=os:getpid"], LAPTOP, "cannot be called with (groups, config)"),
        (["algorithm.policy_loss.name=os:sep"], LAPTOP, "algorithm.policy_loss.name='os:sep' is a str"),
        (["reward.function=nope"], LAPTOP, "reward.function"),
        (["learner.deepspeed.zero_optimisation.stage=2"], LAPTOP, "did you mean zero_optimization"),
        (["reward.function=no_such_module:f"], LAPTOP, "reward.function"),
        (["quantization.ignore=[nonesuch]"], LAPTOP, "quantization.ignore"),
        (["quantization=axbxp", "quantization.precision=k9"], LAPTOP, "quantization.precision='k9' is no setting"),
        (["quantization=axbxp", "quantization.precision={nonesuch:k4-w1-a2}"], LAPTOP, "quantization.precision='nonesuch' matches"),
        (
            ["quantization=axbxp", "quantization.ignore=[down_proj]", "quantization.precision={down_proj:k4-w1-a2}"], LAPTOP,
            "quantization.precision='down_proj' matches none",
        ),
        (["rollout.engine_args.seed=1"], LAPTOP, "rollout.engine_args.seed"),
        (["rollout.engine_args.max_num_sqs=1"], LAPTOP, "did you mean max_num_seqs"),
        (["rollout.engine_args.max_model_len=100"], LAPTOP, "rollout.engine_args.max_model_len=100 is shorter"),
        (["rollout.stop_token_ids=[7,320]"], LAPTOP, "rollout.stop_token_ids=320"),
        (["data.train.path=/"], LAPTOP, "data.train.path=/: it is a folder; name a file in it, or /*.json"),
        (["learner.deepspeed.optimizer.type=SGD"], LAPTOP, "learner.deepspeed.optimizer"),
        (["rollout.tensor_parallel_size=3", "cluster=gpu", "sync.transport=shared_memory"], with_gpus(8), "use one of 1, 2, 4"),
        (
            ["rollout.tensor_parallel_size=4", "quantization=lobcq"], LAPTOP,
            "rollout.tensor_parallel_size=4 cuts model.layers.0.mlp.down_proj into parts: quantization=lobcq needs a multiple "
            "of 64 columns in each, not 32; use fewer ranks, give quantization.codebooks with shorter arrays (L_A)",
        ),
        (["rollout.tensor_parallel_size=2", "quantization=fp8_block"], LAPTOP, "into parts: quantization=fp8_block needs"),
        (["rollout.max_response_tokens=1000", "learner.max_tokens_per_micro_batch=2000"], LAPTOP, "512 positions"),
        (["evaluation.max_response_tokens=1000"], LAPTOP, "512 positions"),
        (["model.attn_implementation=spda"], LAPTOP, "model.attn_implementation=spda is unknown; use one of eager, "),
        (["model.tokenizer=./nonesuch"], LAPTOP, "model.tokenizer=./nonesuch does not exist"),
        (["stages=[{from_step:9,max_response_tokens:500}]", "learner.max_tokens_per_micro_batch=600"], LAPTOP, "512 positions"),
        (
            ["stages=[{from_step:9,max_response_tokens:128}]", "rollout.engine_args.kv_cache_memory_bytes=80000"],
            LAPTOP, "does not hold one sequence of 192 tokens; use at least 98304",
        ),
        (["cluster=gpu"], LAPTOP, "cluster.device=cuda"),
        (["cluster.device=auto", "sync.transport=nccl"], LAPTOP, "sync.transport=nccl"),
        (["cluster.device=auto", "cluster.colocate=true"], LAPTOP, "cluster.colocate=true"),
        (["cluster=gpu", "learner.num_ranks=8"], with_gpus(8), "need 9 GPUs, 8 found"),
        (["cluster=gpu", "quantization=fp8"], with_gpus(2, capability=(8, 0)), "use quantization=int8"),
        (["cluster=gpu", "quantization=int8"], with_gpus(2, capability=(12, 0)), "use quantization=fp8 (gpu has 12.0)"),
        (
            ["cluster.device=auto"], dataclasses.replace(LAPTOP, hidden_gpus="/dev/nvidia0 exists; update the driver"),
            "cluster.device=auto would train on the CPU: /dev/nvidia0 exists",
        ),
        ([], dataclasses.replace(LAPTOP, memory_bytes=GIB), "memory"),
        (["rollout.engine_args.kv_cache_memory_bytes=1000"], LAPTOP, "use at least 65536"),
    ],
)
def test_what_cannot_run_is_refused(needed: list[str], overrides: list[str], machine: Hardware, told: str) -> None:
    with pytest.raises(ValueError) as caught:
        plan([*needed, *overrides], machine)
    assert told in str(caught.value)


def test_mlp_layers_that_do_not_split_are_refused(needed: list[str]) -> None:
    config = compose([*needed, "rollout.tensor_parallel_size=4", "quantization=nvfp4"])
    model = plan(needed).model
    check_model(config, model)
    with pytest.raises(ConfigError, match="tensor_parallel_size=4 does not divide the 130 channels"):
        check_model(config, dataclasses.replace(model, intermediate_size=130))


def test_a_learner_that_does_not_fit_its_gpu_is_refused(needed: list[str], tmp_path: Path) -> None:
    from transformers import Qwen2Config

    Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, tie_word_embeddings=False,
    ).save_pretrained(tmp_path)  # fmt: skip
    seven_billion = [*needed, f"model.path={tmp_path}", "cluster=gpu", "learner.dtype=bfloat16", "sync.track_changes=false"]
    machine = dataclasses.replace(with_gpus(8), memory_bytes=512 * GIB)
    with pytest.raises(ConfigError, match="learner.zero_stage"):
        plan(seven_billion, machine)
    found = plan([*seven_billion, "learner.num_ranks=7", "learner.zero_stage=3"], machine)
    assert found.model.num_parameters == 7_615_616_512  # published size of Qwen2.5-7B
    assert math.isclose(found.bf16_bytes / found.wire_bytes, 1.75, rel_tol=0.01)  # embeddings and head stay bfloat16


STRANGE = (
    '{"model_type": "qwen2", "num_attention_heads": 0}',
    '{"model_type": "qwen2", "num_hidden_layers": 3, "layer_types": ["full_attention"]}',
    '{"model_type": "qwen2", "rope_scaling": {"rope_type": "unheard"}}',
)


@pytest.mark.parametrize("content", [None, "{}", '{"model_type": "unheard"}', "not json", *STRANGE])
def test_a_folder_that_is_no_model_is_refused_by_its_key(needed: list[str], tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match="model.path="):
        plan([*needed, f"model.path={tmp_path}"])


def test_a_reward_module_that_ends_its_process_does_not_end_ours(needed: list[str], tmp_path: Path) -> None:
    (tmp_path / "ends.py").write_text("import os\nos._exit(4)\n")
    with pytest.raises(ValueError, match=r"reward\.function=.*ends\.py.*died \(exit code 4\)"):
        plan([*needed, f"reward.function='{tmp_path}/ends.py:score'"])


def test_what_kept_tokens_cost_is_told_where_the_distribution_is_cut(needed: list[str]) -> None:
    assert not any("each token travels" in warning for warning in plan(needed).warnings)
    for override, most in (("rollout.top_p=0.9", -(-plan(needed).model.vocab_size // 8)), ("rollout.top_k=5", 20)):
        assert any(f"at most {most} bytes a token" in warning for warning in plan([*needed, override]).warnings)


@pytest.mark.parametrize(
    ("flags", "device", "capability", "chosen"),
    [
        ({"avx2"}, "cpu", None, "float32"),
        ({"avx2", "avx512_bf16"}, "cpu", None, "bfloat16"),
        ({"amx_bf16"}, "cpu", None, "bfloat16"),
        ({"asimd", "bf16"}, "cpu", None, "bfloat16"),
        (set(), "cpu", None, "bfloat16"),
        (set(), "cuda", (9, 0), "bfloat16"),
        (set(), "cuda", (7, 5), "float16"),
    ],
)
def test_the_engines_dtype_is_one_that_the_device_multiplies(
    needed: list[str], flags: set[str], device: str, capability: tuple[int, int] | None, chosen: str
) -> None:
    machine = dataclasses.replace(
        LAPTOP if capability is None else with_gpus(2, capability=capability), cpu_flags=frozenset(flags)
    )
    assert engine_dtype("auto", device, machine) == chosen
    assert engine_dtype("float16", device, machine) == "float16"
    found = plan([*needed, f"cluster.device={device}"], machine)
    other = plan([*needed, f"cluster.device={device}", "rollout.dtype=float32"], machine)
    size = {"float32": 4, "bfloat16": 2, "float16": 2}[chosen]
    assert (found.engine_dtype, other.engine_dtype) == (chosen, "float32")
    assert found.engine.kv_per_sequence * 4 == other.engine.kv_per_sequence * size
    assert found.wire_bytes <= other.wire_bytes


def test_bfloat16_that_is_asked_for_where_it_is_emulated_is_told(needed: list[str]) -> None:
    machine = dataclasses.replace(LAPTOP, cpu_flags=frozenset({"avx2"}))
    found = plan([*needed, "rollout.dtype=bfloat16", "learner.dtype=bfloat16"], machine).warnings
    for key in ("rollout.dtype=float32", "learner.dtype=float32"):
        assert any(f"{key} is faster" in warning for warning in found)
    assert not any("is faster" in warning for warning in plan(needed, machine).warnings)


def test_a_critic_takes_the_memory_of_a_second_learner_that_runs_after_the_first(needed: list[str], tmp_path: Path) -> None:
    from transformers import Qwen2Config

    bfloat16 = [*needed, "learner.dtype=bfloat16", "learner.num_ranks=2", "learner.zero_stage=1"]
    alone, same = plan(bfloat16).learner, plan([*bfloat16, "algorithm=ppo"]).learner
    size = plan(bfloat16).model.num_parameters + 64 + 1  # tied: the output layer is the embedding; a head of its own
    assert same.critic == 2 * size + 4 * size + 12 * size // 2 + 2 * size  # weights, gradients, optimizer, reduce bucket
    assert same.on_device - alone.on_device == same.critic
    Qwen2Config(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32,
    ).save_pretrained(tmp_path)  # fmt: skip
    deeper = plan([*bfloat16, "algorithm=ppo", f"critic.path={tmp_path}"]).learner
    tokens = compose(bfloat16).learner.max_tokens_per_micro_batch
    backward = 2 * tokens * (3 * 128 + 2 * (4 - 2) * 32)  # of one layer, at a time: feed-forward, repeated keys and values
    added = alone.activations - backward  # by two more layers
    assert deeper.activations == alone.activations + added and deeper.critic > same.critic
    assert deeper.on_device == alone.on_device + added + deeper.critic
