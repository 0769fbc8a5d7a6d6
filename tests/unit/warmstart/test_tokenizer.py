"""Tokenizers made from scratch survive the way back through AutoTokenizer."""

import pytest
from transformers import AutoTokenizer

from qurl.warmstart import make_tiny_model, train_tokenizer
from qurl.warmstart.tokenizer import MIN_VOCAB_SIZE

TEXTS = [
    "12+34=46\n#### 46",
    "Caf\u00e9, \u6f22\u5b57 \U0001f642\t  two  spaces",
    "",
    " leading",
    "trailing \n\n",
    "1,234.50 %",
    "<|not special|>",
]


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("chat", [False, True])
def test_decode_inverts_encode_after_loading_beside_each_architecture(tmp_path, architecture, chat):
    made = train_tokenizer(["12+34=46\n#### 46", "What is 7 times 8? The answer is 56."], 320, chat=chat)
    loaded = AutoTokenizer.from_pretrained(make_tiny_model(tmp_path, architecture=architecture, chat=chat))
    for text in TEXTS:
        ids = loaded.encode(text)
        assert loaded.decode(ids) == text
        assert ids == made.encode(text)
    assert len(loaded) == len(made) == 320


def test_digits_are_single_tokens_even_when_training_text_repeats_a_number():
    tokenizer = train_tokenizer(["2024 2024 2024 year year year"] * 50, 300)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("2024")] == ["2", "0", "2", "4"]
    assert len(tokenizer.encode("year")) == 1


def test_special_tokens_end_sequences_and_vanish_from_decoded_text(tmp_path):
    plain = AutoTokenizer.from_pretrained(make_tiny_model(tmp_path / "plain"))
    chat = AutoTokenizer.from_pretrained(make_tiny_model(tmp_path / "chat", chat=True))
    assert plain.eos_token == plain.pad_token == "<|endoftext|>"
    assert (chat.eos_token, chat.pad_token) == ("<|im_end|>", "<|endoftext|>")
    every_id = list(range(len(plain)))
    assert "<|" not in plain.decode(every_id, skip_special_tokens=True)
    assert plain.chat_template is None


def test_the_chat_template_renders_turns_and_opens_the_answer(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(make_tiny_model(tmp_path, chat=True))
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+2"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n1+2<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.encode(text)[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_a_vocabulary_that_cannot_hold_the_bytes_is_refused():
    with pytest.raises(ValueError, match=f"at least {MIN_VOCAB_SIZE}"):
        train_tokenizer(["a"], 256)
