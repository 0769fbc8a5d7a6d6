"""What a run is made from, by content: model, prompts, reward and other outside code.

Fingerprints are in every checkpoint. A resumed run may find the same content at another path, and is refused where a
path has other content than when the run began."""

from __future__ import annotations

import ast
import hashlib
import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qurl.config import TrainConfig
from qurl.config.paths import code_file
from qurl.data.spill import SpilledRow
from qurl.errors import ConfigError
from qurl.types import Prompt

Fingerprint = dict[str, Any]  # JSON values
MODEL_SUFFIXES = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".py", ".tiktoken")
WHOLE_BYTES = 8 << 20  # files up to this size are read whole
SAMPLE_BYTES, NUM_SAMPLES = 64 << 10, 64  # of larger ones this much is read, spread evenly
PARTS = {"text": "text", "tokens": "tokens", "reward": "ground truth, source or other columns"}
NUM_RANGES = 64  # parts of a data set that can be told apart
REMEDY = "restore it, or begin another run with another run_name"


def fingerprints(
    config: TrainConfig, prompts: Sequence[Prompt], evaluation: Mapping[str, Sequence[Prompt]]
) -> dict[str, Fingerprint]:
    """Configuration key -> fingerprint. config: with absolute paths. prompts, evaluation: rendered and tokenized."""
    model, algorithm = config.model, config.algorithm
    found = {"model.path": model_fingerprint(model.path, model.revision)}
    if model.tokenizer:
        found["model.tokenizer"] = model_fingerprint(model.tokenizer, model.revision)
    if config.algorithm.uses_critic and config.critic.path:
        found["critic.path"] = model_fingerprint(config.critic.path, config.critic.revision)
    for key, name in (
        ("reward.function", config.reward.function),
        ("algorithm.advantage.name", algorithm.advantage.name),
        ("algorithm.correction.name", algorithm.correction.name),
        ("algorithm.policy_loss.name", algorithm.policy_loss.name),
    ):
        found[key] = _code_fingerprint(name)
    found["data.train.path"] = prompts_fingerprint(prompts)
    return found | {f"data.eval.{name}.path": prompts_fingerprint(each) for name, each in evaluation.items()}


def refuse_other_inputs(before: Mapping[str, Fingerprint], now: Mapping[str, Fingerprint], values: Mapping[str, Any]) -> None:
    """Raise ConfigError where something has other content than in `before`, naming it.

    values: configuration key -> what this command says. An evaluation set may be new or gone."""
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) == now.get(key) or (key.startswith("data.eval.") and not (key in before and key in now)):
            continue
        raise ConfigError(f"{key}={values.get(key)}: {_difference(before.get(key, {}), now.get(key, {}))}; {REMEDY}")


def model_fingerprint(path: str, revision: str | None) -> Fingerprint:
    """The files of a folder that matter, each by its content; of a hub model its name."""
    if not Path(path).is_dir():
        return {"name": path, "revision": revision}
    files = sorted(file for file in Path(path).iterdir() if file.suffix in MODEL_SUFFIXES and file.is_file())
    return {"files": {file.name: _file_digest(file) for file in files}}


def prompts_fingerprint(prompts: Sequence[Prompt]) -> Fingerprint:
    """What the loop sees of a data set: texts, tokens, and what a reward is told beside the response; and where it differs."""
    size = -(-len(prompts) // NUM_RANGES) or 1
    ranges = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    return {
        "count": len(prompts),
        "text": _digest(prompt.text.encode() for prompt in prompts),
        "tokens": _digest(map(_tokens, prompts)),
        "reward": _digest(map(_for_the_reward, prompts)),
        "ranges": [
            [part[0].prompt_id, part[-1].prompt_id, _digest(map(_whole, part))[:8]] for part in ranges
        ],
    }


def _difference(before: Fingerprint, now: Fingerprint) -> str:
    """What differs, in words."""
    if "count" in before and "count" in now:
        if before["count"] != now["count"]:
            return f"it makes {now['count']} prompts, and made {before['count']} when this run began"
        parts = [words for name, words in PARTS.items() if before[name] != now[name]]
        ranges = zip(before["ranges"], now["ranges"], strict=True)
        where = [f" from {first} to {last}" for (first, last, old), (*_, new) in ranges if old != new]
        return f"prompts{where[0] if where else ''} differ in {' and '.join(parts)} from those that this run began with"
    if "files" in before and "files" in now:
        old, new = before["files"], now["files"]
        name = next(name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name))
        return f"{name} is not what it was when this run began"
    if before.get("code") and now.get("code"):
        return "the code in the file is not what it was when this run began"
    return f"this run began with {before.get('name') or 'a folder'}" if before else "this run began without it"


def _tokens(prompt: Prompt) -> bytes:
    return array("q", prompt.token_ids).tobytes()


def _whole(prompt: Prompt) -> bytes:
    return prompt.text.encode() + _tokens(prompt) + _for_the_reward(prompt)


def _for_the_reward(prompt: Prompt) -> bytes:
    extra = prompt.extra.loaded() if isinstance(prompt.extra, SpilledRow) else prompt.extra
    told = [prompt.prompt_id, prompt.ground_truth, prompt.data_source, extra]
    return json.dumps(told, sort_keys=True, default=str).encode()


def _code_fingerprint(name: str) -> Fingerprint:
    """A table's entry or a module's by its name; a file's by its syntax tree, so that comments and blank lines may change."""
    file = code_file(name)
    if not file:
        return {"name": name}
    attribute = name[len(file) :]
    return {"code": _digest([ast.dump(ast.parse(Path(file).read_text(encoding="utf-8"))).encode()]), "name": attribute}


def _file_digest(file: Path) -> str:
    size = file.stat().st_size
    with file.open("rb") as opened:
        if size <= WHOLE_BYTES:
            return f"{size}:{_digest([opened.read()])}"
        samples = []
        for index in range(NUM_SAMPLES):
            opened.seek((size - SAMPLE_BYTES) * index // (NUM_SAMPLES - 1))
            samples.append(opened.read(SAMPLE_BYTES))
        return f"{size}:{_digest(samples)}"


def _digest(parts: Iterable[bytes]) -> str:
    """A hash over parts and their borders."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.hexdigest()[:16]
