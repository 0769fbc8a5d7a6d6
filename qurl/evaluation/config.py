"""What `qurl eval` is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qurl.config import ControlTokens
from qurl.config.codebooks_file import resolved_codebooks
from qurl.config.precision_file import resolved_precision
from qurl.config.validate import MAX_SEED
from qurl.errors import ConfigError
from qurl.evaluation.benchmarks import BENCHMARKS, PROMPTS


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """Model, benchmarks, sampling. An error names the option of the command line, which is the field's name with dashes."""

    model: str  # Hugging Face folder, hub name, or run folder (its latest checkpoint)
    benchmarks: list[str]  # keys of qurl.evaluation.benchmarks.BENCHMARKS
    data: dict[str, str] = field(default_factory=dict)  # benchmark -> local file
    format: str = "none"  # key of qurl.quantization.FORMATS; the checkpoint is encoded as it loads
    dtype: str = "auto"  # as rollout.dtype, of what is not quantized
    ignore: list[str] = field(default_factory=list)  # as quantization.ignore
    precision: Any = None  # as quantization.precision
    codebooks: Any = None  # as quantization.codebooks
    rotation: int = 0  # as quantization.rotation
    group_size: int = 0  # as quantization.group_size
    samples: int = 1  # per problem
    k: list[int] = field(default_factory=list)  # of pass@k; empty: the number of samples
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    max_tokens: int = 4096  # of a response
    max_prompt_tokens: int = 2048  # a longer prompt is an error: leaving problems out would change the benchmark
    seed: int = 0  # of the samples and of the bootstrap
    max_problems: int | None = None  # the first ones only
    prompt: str | None = None  # key of PROMPTS or a template with {problem}; default: each benchmark's own
    reward: str | None = None  # as reward.function; default: each benchmark's own
    reward_kwargs: dict[str, Any] = field(default_factory=dict)  # as reward.kwargs
    chat_template: bool | None = None  # default: where the tokenizer has one
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)  # as data.chat_template_kwargs
    control_tokens: str = "text"  # as data.control_tokens
    out: str | None = None  # folder of the evaluation; default: see qurl.evaluation.evaluate.output_folder
    engines: int = 1
    tensor_parallel_size: int = 1
    engine_args: dict[str, Any] = field(default_factory=dict)  # handed to vLLM under vLLM's names
    reward_timeout_s: float = 10.0
    reward_workers: int = 1

    def __post_init__(self) -> None:
        self.precision = resolved_precision(self.precision, "--precision")
        self.codebooks = resolved_codebooks(self.codebooks, "--codebooks")


DTYPES = ("auto", "bfloat16", "float16", "float32")

FREE_FIELDS = frozenset({"out", "k", "engines", "reward_workers"})
"""What may differ between the command that started an evaluation and the one that goes on: no sample depends on it."""


def validate(config: EvalConfig) -> None:
    """Raises ConfigError, naming the option and a value that works, for the first thing that cannot run."""
    known = ", ".join(BENCHMARKS)
    _require(bool(config.benchmarks), f"--benchmarks is empty; name some of {known}")
    for name in [*config.benchmarks, *config.data]:
        _require(name in BENCHMARKS, f"benchmark {name!r} is unknown; use {known}; --data NAME=FILE gives one a file of its own")
    for name in config.data:
        _require(name in config.benchmarks, f"--data {name}=... names a benchmark that is not evaluated; add it to --benchmarks")
    for name in config.benchmarks:
        _require(config.benchmarks.count(name) == 1, f"--benchmarks names {name} twice")
    for option in ("samples", "max_tokens", "max_prompt_tokens", "engines", "tensor_parallel_size", "reward_workers"):
        value = getattr(config, option)
        _require(value >= 1, f"--{option.replace('_', '-')} {value} cannot run; use at least 1")
    asked = {config.dtype, config.engine_args.get("dtype", config.dtype)}
    for dtype in sorted(asked):
        _require(dtype in DTYPES, f"--dtype {dtype} is unknown; use one of {', '.join(DTYPES)}")
    _require(len(asked - {"auto"}) < 2, f"--dtype {config.dtype} and --engine-arg dtype disagree; leave the latter out")
    _require(config.max_problems is None or config.max_problems >= 1, f"--max-problems {config.max_problems} leaves no problem")
    _require(0 <= config.temperature < float("inf"), f"--temperature {config.temperature} cannot run; use 0 or more, e.g. 0.6")
    _require(0 < config.top_p <= 1, f"--top-p {config.top_p} cannot run; use a number in (0, 1]")
    _require(0 < config.reward_timeout_s < float("inf"), f"--reward-timeout-s {config.reward_timeout_s} is no time limit")
    _require(
        config.temperature > 0 or config.samples == 1,
        f"--samples {config.samples} with --temperature 0 gives equal samples; use --temperature 0.6 or --samples 1",
    )
    for k in config.k:
        _require(k >= 1, f"--k {k} cannot be had; use at least 1")
        _require(k <= config.samples, f"--k {k}: pass@{k} cannot be had from --samples {config.samples}; use --samples {k} or more")
    _require(0 <= config.seed <= MAX_SEED, f"--seed {config.seed} is no seed; use a number from 0 to {MAX_SEED}")
    _require(
        config.format != "none" or not config.ignore, "--ignore with --format none changes nothing; leave it out or choose a format"
    )
    tokens = [mode.name for mode in ControlTokens]
    _require(config.control_tokens in tokens, f"--control-tokens {config.control_tokens} is unknown; use {' or '.join(tokens)}")
    prompt = config.prompt
    _require(
        prompt is None or prompt in PROMPTS or "{problem}" in prompt,
        f"--prompt {prompt!r} is neither one of {', '.join(PROMPTS)} nor a template with {{problem}} in it",
    )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)
