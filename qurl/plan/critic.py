"""Whether the critic's decoder can read what the policy writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qurl.config.model import ModelConfig
from qurl.config.run import TrainConfig
from qurl.errors import ConfigError
from qurl.learner.huggingface import TOKENIZER_FILES
from qurl.plan.model_facts import ModelFacts, read_model_facts


def read_critic_facts(config: TrainConfig, policy: ModelFacts) -> ModelFacts | None:
    """Facts of the critic, None without one. Raises ConfigError, naming critic.path, where it does not fit the policy."""
    if not config.algorithm.uses_critic:
        return None
    facts = policy
    if config.critic.path is not None:
        facts = read_model_facts(config.critic.model(config.model), "critic")
        _check_tokens(config, policy, facts)
        longest, positions = config.longest_tokens, facts.max_position_embeddings
        if positions is not None and longest > positions:
            raise ConfigError(f"critic.path={config.critic.path} has {positions} positions, prompt and response up to {longest}; "
                              "use a critic for longer texts, or critic.path=null")  # fmt: skip
    body = {name: shape for name, shape in facts.parameters.items() if name.startswith(facts.base_model_prefix)}
    return replace(facts, parameters=body | {"head.weight": (1, facts.hidden_size), "head.bias": (1,)})


def _check_tokens(config: TrainConfig, policy: ModelFacts, critic: ModelFacts) -> None:
    """The critic is given token ids, so each must mean to it what it means to the policy. A critic may know more tokens; one whose
    tokenizer cannot be read is judged by the size of its vocabulary."""
    where, model = f"critic.path={config.critic.path} does not fit the policy", config.model
    remedy = "use a critic with the policy's tokenizer, or critic.path=null to start from model.path"
    mine = _vocabulary(replace(model, path=model.tokenizer or model.path, revision=None if model.tokenizer else model.revision))
    theirs = _vocabulary(config.critic.model(model))
    if mine is None or theirs is None:
        if critic.vocab_size != policy.vocab_size:
            raise ConfigError(f"{where}: its vocabulary has {critic.vocab_size} tokens, that of model.path={model.path} has "
                              f"{policy.vocab_size}, and there are not two tokenizers to compare; {remedy}")  # fmt: skip
        return
    different = [(token_id, token) for token, token_id in mine.items() if theirs.get(token) != token_id]
    if different:
        token_id, token = min(different)
        found = theirs.get(token, "unknown")
        raise ConfigError(f"{where}: token {token!r} is {token_id} to the policy and {found} to it; {remedy}")
    if max(mine.values()) >= critic.vocab_size:
        raise ConfigError(f"{where}: its vocabulary has {critic.vocab_size} tokens, the policy's tokenizer makes token "
                          f"{max(mine.values())}; {remedy}")  # fmt: skip


def _vocabulary(config: ModelConfig) -> dict[str, int] | None:
    """Token -> id of the tokenizer at config.path; None where there is none."""
    from transformers import AutoTokenizer

    folder = Path(config.path)
    if folder.is_dir() and not any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)):
        return None  # transformers would make up an empty one
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError):
        return None
    return dict(tokenizer.get_vocab())
