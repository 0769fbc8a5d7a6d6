"""The warm start trains on responses only, sequences of a packed row apart, and depends on its seed alone."""

import random

import pytest
import torch
from torch.nn import functional as F

from qurl.warmstart import Demonstration, model_config, new_model, train_tokenizer, warm_start
from qurl.warmstart.sft import IGNORED, ROW_TOKENS, _batches, _encode, _pack


@pytest.fixture
def tokenizer():
    return train_tokenizer(["1+2=#### 3"], 320)


def tiny(tokenizer, architecture="qwen3", seed=0):
    return new_model(model_config(tokenizer, architecture=architecture, hidden_size=64, num_layers=2), seed)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
def test_packed_rows_have_the_loss_of_separate_sequences(tokenizer, architecture):
    rng = random.Random(0)
    batch = []
    for length in [ROW_TOKENS + 7, 60, 50, 40, 33, 9, 9, 3]:
        ids = [rng.randrange(3, 320) for _ in range(length)]
        batch.append((ids, [IGNORED] * 2 + ids[2:]))
    model = tiny(tokenizer, architecture).double().eval()
    with torch.no_grad():
        alone = 0.0
        for ids, _ in batch:
            logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            alone -= sum(logprobs[t - 1, ids[t]].item() for t in range(2, len(ids)))
        input_ids, positions, labels = _pack(batch, tokenizer.pad_token_id)
        logits = model(input_ids=input_ids, position_ids=positions, use_cache=False).logits
        packed = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")
    assert input_ids.shape[0] < len(batch)
    assert (labels != IGNORED).sum() == sum(len(ids) - 2 for ids, _ in batch)
    assert packed.item() == pytest.approx(alone, rel=1e-6)  # the rotary tables stay float32


def test_only_the_response_and_its_end_are_labels(tokenizer):
    ids, labels = _encode(tokenizer, Demonstration(prompt="1+2=", response="#### 3"))
    assert tokenizer.decode(ids) == "1+2=#### 3<|endoftext|>"
    assert labels == [IGNORED] * len(tokenizer.encode("1+2=")) + ids[len(tokenizer.encode("1+2=")) :]


def test_an_empty_prompt_does_not_train_a_sequence_on_its_neighbour(tokenizer):
    pair = _encode(tokenizer, Demonstration(prompt="", response="123"))
    _, _, labels = _pack([pair, pair], tokenizer.pad_token_id)
    assert labels[0].tolist() == 2 * [IGNORED, *pair[0][1:]]


def test_every_epoch_sees_every_sequence_once():
    batches = list(_batches(list(range(10)), 4, 2, random.Random(0)))
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    first, second = sum(batches[:3], []), sum(batches[3:], [])
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


def test_a_few_steps_teach_a_fixed_answer_and_repeat_bit_for_bit(tokenizer):
    demonstrations = [Demonstration(prompt=f"{n}+1=", response=f"#### {n + 1}") for n in range(4)] * 4
    models = [tiny(tokenizer) for _ in range(2)]
    losses = [
        warm_start(model, tokenizer, demonstrations, batch_size=8, num_epochs=15, learning_rate=1e-2, seed=5) for model in models
    ]
    assert losses[0] == losses[1] < 0.1
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
    answer = models[0].generate(torch.tensor([tokenizer.encode("3+1=")]), max_new_tokens=8, do_sample=False)[0]
    assert tokenizer.decode(answer).startswith("3+1=#### 4<|endoftext|>")


def test_no_demonstrations_and_a_diverging_run_are_refused(tokenizer):
    with pytest.raises(ValueError, match="no demonstrations"):
        warm_start(tiny(tokenizer), tokenizer, [])
    model = tiny(tokenizer)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="loss nan at step 0"):
        warm_start(model, tokenizer, [Demonstration(prompt="1", response="2")])
