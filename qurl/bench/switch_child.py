"""The measuring process of qurl.bench.switch, see qurl.bench.child."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qurl.bench.child import RESULT, report
from qurl.processes import die_with_parent

if TYPE_CHECKING:
    from vllm import LLMEngine

PROMPT = list(range(5, 13))
NUM_TOKENS = 8

Sample = tuple[list[int], list[float]]  # tokens and their log-probabilities


def main(folder: Path, job: dict[str, Any]) -> None:
    """Write, by precision, seconds of each round and whether the engine computed what one started with the precision does."""
    import torch

    from qurl.bench.rollout_child import build_engine
    from qurl.bench.rollout_shapes import write_models

    path = write_models(job["shape"], ["axbxp"], "stock_", folder)["axbxp"]
    precisions, num_rounds = job["precisions"], job["num_rounds"]
    is_eager = not torch.cuda.is_available()  # as in training
    started: dict[str, Sample] = {}
    for precision in precisions if job["compare"] else ():
        started[precision] = sample(build_engine(path, "axbxp", is_eager, precision))
        gc.collect()  # ends the engine: a later collection would end its successors' groups
    engine = build_engine(path, "axbxp", is_eager, precisions[-1])
    seconds, equal = switch_in_turns(engine, precisions, num_rounds, started, lambda done: report(done, num_rounds))
    found = {"num_threads": torch.get_num_threads(), "seconds": seconds, "equal": equal}
    (folder / RESULT).write_text(json.dumps(found))


def switch_in_turns(
    engine: LLMEngine, precisions: Sequence[str], num_rounds: int, started: Mapping[str, Sample],
    done: Callable[[int], None] = lambda rounds: None,
) -> tuple[dict[str, list[float]], dict[str, list[bool]]]:  # fmt: skip
    """Seconds of every switch, by precision; and whether the engine then sampled what `started` has, where that has something."""
    from qurl.vllm_plugin.axbxp import switch_precision

    seconds: dict[str, list[float]] = {precision: [] for precision in precisions}
    equal: dict[str, list[bool]] = {precision: [] for precision in started}
    for index in range(num_rounds):
        for precision in precisions:
            began = time.perf_counter()
            switch_precision(engine, precision)
            seconds[precision].append(time.perf_counter() - began)
            if precision in started:
                equal[precision].append(sample(engine) == started[precision])
        done(index + 1)
    return seconds, equal


def sample(engine: LLMEngine) -> Sample:
    """The same request every time, the engine's only one."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = SamplingParams(
        temperature=1.0, seed=0, logprobs=0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False, flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )  # fmt: skip
    engine.add_request("sample", {"prompt_token_ids": PROMPT}, sampling)
    finished: list[Any] = []
    while engine.has_unfinished_requests():
        outputs: list[Any] = engine.step()  # which may be of other models, by their type
        finished += [output.outputs[0] for output in outputs if output.finished]
    [completion] = finished
    return list(completion.token_ids), list(completion.logprobs.logprobs)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    main(Path(sys.argv[2]), json.loads(sys.argv[3]))
