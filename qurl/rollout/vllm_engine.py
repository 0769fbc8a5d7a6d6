"""vLLM's engine with the arguments a policy gradient needs."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qurl.config import ModelConfig, QuantizationConfig, RolloutConfig
from qurl.hardware import detect, engine_dtype
from qurl.rollout.config_json import stray_head_counts
from qurl.rollout.request import Sampling

CONTROLLED_ARGS = frozenset({
    "model", "revision", "tokenizer", "quantization", "hf_overrides", "load_format", "logprobs_mode", "generation_config",
    "tensor_parallel_size", "skip_tokenizer_init", "weight_transfer_config", "seed", "return_sampling_mask",
})  # fmt: skip
"""Engine arguments that qurl sets itself; `rollout.engine_args` must not name them."""


def known_engine_args() -> frozenset[str]:
    """What vLLM's EngineArgs take, read from its source: importing it takes ten seconds. Raises RuntimeError without vLLM."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise RuntimeError("vLLM is not installed; `qurl doctor` says which version is needed")
    source = Path(spec.origin).with_name("engine") / "arg_utils.py"
    classes = (node for node in ast.parse(source.read_text()).body if isinstance(node, ast.ClassDef) and node.name == "EngineArgs")
    fields = (node.target for node in next(classes).body if isinstance(node, ast.AnnAssign))
    return frozenset(field.id for field in fields if isinstance(field, ast.Name))


CPU_KV_CACHE_BYTES = 1 << 30


def build_engine(
    model: ModelConfig,
    rollout: RolloutConfig,
    quantization: QuantizationConfig,
    *,
    max_model_len: int,
    seed: int,
    load_weights: bool = False,
) -> tuple[Any, Callable[[Sampling, int], Any]]:
    """An in-process LLMEngine, and a maker of SamplingParams.

    load_weights: the engine reads the checkpoint of model.path and encodes it as it loads, from vLLM's dtype, where a learner
    encodes from its own; without, it has no real weights before they come through the weight stream.
    Raises ValueError where engine_args names an argument that qurl controls; what vLLM raises passes through."""
    import torch
    from transformers import AutoConfig
    from vllm import EngineArgs, LLMEngine, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from qurl.vllm_plugin import compat
    from qurl.vllm_plugin import engine_args as plugin_engine_args

    taken = CONTROLLED_ARGS & set(rollout.engine_args)
    if taken:
        raise ValueError(f"rollout.engine_args.{sorted(taken)[0]} is set by qurl itself; remove it")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    defaults: dict[str, Any] = {
        "max_model_len": max_model_len,
        "disable_log_stats": True,
        "dtype": engine_dtype(rollout.asked_dtype, device, detect()),
        "max_num_seqs": rollout.max_num_seqs,  # said outright: vLLM's own depend on what uses it
        "max_num_batched_tokens": rollout.max_num_batched_tokens(device),
    }
    if rollout.tensor_parallel_size > 1:
        defaults["distributed_executor_backend"] = "mp"  # in a Ray placement group vLLM would take GPUs from Ray once more
    if not torch.cuda.is_available():
        defaults |= {"enforce_eager": True, "kv_cache_memory_bytes": CPU_KV_CACHE_BYTES}
    controlled = plugin_engine_args(
        quantization.format, quantization.ignore, quantization.precision, quantization.codebooks, quantization.rotation,
        quantization.group_size,
    )
    found = AutoConfig.from_pretrained(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    controlled["hf_overrides"] |= stray_head_counts(found.get_text_config())
    if model.max_position_embeddings is not None:
        controlled["hf_overrides"]["max_position_embeddings"] = model.max_position_embeddings
    masks_by_vllm = rollout.cuts and torch.cuda.is_available()  # elsewhere by our own sampler
    if rollout.cuts:
        _check_kept_tokens(rollout, compat.reports_kept_tokens(), masks_by_vllm)
        compat.keep_sampling_masks_as_arrays()
    if masks_by_vllm:
        controlled["return_sampling_mask"] = True
    if not load_weights and (plugins := compat.logits_processor_plugins()):
        raise ValueError(
            f"vLLM loads the logits processor {plugins[0]} of an installed package into every engine, and the learner cannot "
            "follow it; uninstall that package"
        )
    args = EngineArgs(
        model=model.path,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        skip_tokenizer_init=True,  # token ids in, token ids out; the pool detokenizes
        load_format="auto" if load_weights else "dummy",
        logprobs_mode="processed_logprobs",  # the distribution really sampled from, whatever the temperature
        generation_config="vllm",  # nothing implicit from generation_config.json
        tensor_parallel_size=rollout.tensor_parallel_size,
        seed=seed,
        **controlled,
        **(defaults | rollout.engine_args),
    )

    engine = LLMEngine.from_engine_args(args)
    if rollout.cuts and not masks_by_vllm:
        compat.report_kept_tokens(engine)
    vocab_size = engine.model_config.get_vocab_size()

    def sampling_params(sampling: Sampling, sample_seed: int) -> Any:
        temperature, top_k = sampling.temperature, sampling.top_k
        if masks_by_vllm:  # such an engine refuses greedy requests, of an evaluation, and those without top_k
            temperature, top_k = (1.0, 1) if temperature == 0 else (temperature, top_k if top_k > 0 else vocab_size)
        return SamplingParams(
            temperature=temperature,
            top_p=sampling.top_p,
            top_k=top_k,
            max_tokens=sampling.max_tokens,
            stop_token_ids=list(sampling.stop_token_ids),
            seed=sample_seed,
            logprobs=0,  # the sampled token's own
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    return engine, sampling_params


def _check_kept_tokens(rollout: RolloutConfig, is_supported: bool, masks_by_vllm: bool) -> None:
    """Raises ValueError where the engine cannot say which tokens top-p and top-k left."""
    key = f"rollout.top_p={rollout.top_p:g}" if rollout.top_p < 1 else f"rollout.top_k={rollout.top_k}"
    if not is_supported:
        raise ValueError(
            f"{key}: this version of vLLM does not say which tokens were left to draw from, which the learner must know; "
            "install vLLM 0.32, or sample with rollout.top_p=1 rollout.top_k=-1"
        )
    if rollout.engine_args.get("speculative_config") and not masks_by_vllm:
        raise ValueError(
            f"{key} with rollout.engine_args.speculative_config: on a CPU the tokens that were left to draw from are not known for "
            "drafted tokens; use rollout.top_p=1 rollout.top_k=-1, or no speculative_config"
        )
