"""Small byte-level BPE tokenizers.

Every text has an encoding because all 256 bytes are in the vocabulary, and digits stay single tokens because the pre-tokenizer
of Qwen2's class splits them. The class is Qwen2's on purpose: transformers loads that class for every qwen2 and qwen3 model,
whatever the saved folder says, and a tokenizer of another kind would then encode each text to nothing without an error."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import Qwen2Tokenizer

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = [END_OF_TEXT, TURN_START, TURN_END]
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int = 512, chat: bool = False) -> Qwen2Tokenizer:
    """A tokenizer of exactly `vocab_size` tokens: END_OF_TEXT (end of sequence and padding), the ChatML marks, the 256 bytes,
    then merges learned on `texts`; where the texts yield fewer merges, reserved special tokens fill up.

    chat: set the ChatML template and end a turn with TURN_END instead of END_OF_TEXT. Raises ValueError where vocab_size is
    below MIN_VOCAB_SIZE."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size={vocab_size} cannot hold the 256 bytes and special tokens; use at least {MIN_VOCAB_SIZE}")
    blank = Qwen2Tokenizer().backend_tokenizer  # carries the normalizer and pre-tokenizer of the class
    learner = Tokenizer(BPE())
    learner.normalizer = blank.normalizer
    learner.pre_tokenizer = blank.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    vocab, merges = _vocab_and_merges(learner)
    reserved = [f"<|reserved_{i}|>" for i in range(vocab_size - len(vocab))]
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        eos_token=TURN_END if chat else END_OF_TEXT,
        pad_token=END_OF_TEXT,
        extra_special_tokens=[TURN_START, TURN_END, *reserved],
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    assert len(tokenizer) == vocab_size, (len(tokenizer), vocab_size)
    return tokenizer


def _vocab_and_merges(tokenizer: Tokenizer) -> tuple[dict[str, int], list[Any]]:
    """Token -> id, and the pairs of tokens to merge in order of priority."""
    state = json.loads(tokenizer.to_str())["model"]
    return state["vocab"], [tuple(merge) for merge in state["merges"]]
