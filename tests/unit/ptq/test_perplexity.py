"""Losses of documents, by loops; and statistics of perplexities, by the jackknife."""

import copy
import math
import random

import pytest
import torch
import transformers

from qurl.ptq import DocumentLoss, document_losses, encode_documents, increase, perplexity, ratio, replace_linears
from qurl.ptq.journal import journaled_losses
from qurl.ptq.perplexity import decoded_activations
from qurl.quantization import FORMATS, resolved_format


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=61,
        max_position_embeddings=64,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(config).float().eval()


def random_documents():
    rng = random.Random(0)
    return [[[rng.randrange(61) for _ in range(length)] for length in lengths] for lengths in ([5], [16, 16, 3], [2], [9, 2])]


class Characters:
    """A tokenizer of one token a character, whose end token is 0."""

    eos_token_id = 0

    def encode(self, text):
        return [ord(c) for c in text]


def test_documents_are_cut_into_windows_and_end_with_the_end_token():
    windows = encode_documents(["abcd", "xy", ""], Characters(), context=2)
    assert windows == [[[97, 98], [99, 100]], [[120, 121]]]  # a lone end token predicts nothing
    assert encode_documents(["abc"], Characters(), context=8) == [[[97, 98, 99, 0]]]
    with pytest.raises(ValueError, match="no document"):
        encode_documents([""], Characters(), context=8)


def test_losses_equal_those_of_one_window_after_the_other(model):
    documents = random_documents()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.add_(0.1)
        other.lm_head.weight.mul_(1.5)
    found = list(document_losses(other, model, documents))
    for document, loss in zip(documents, found, strict=True):
        expected, divergence = 0.0, 0.0
        for window in document:
            exact, logprobs = (
                each(torch.tensor([window])).logits[0].detach().double().log_softmax(-1)[:-1] for each in (model, other)
            )
            expected -= sum(float(logprobs[i, window[i + 1]]) for i in range(len(window) - 1))
            divergence += float((exact.exp() * (exact - logprobs)).sum())
        assert loss.loss == pytest.approx(expected, rel=1e-5)  # float32 products of other shapes
        assert loss.divergence == pytest.approx(divergence, rel=1e-3)
        assert loss.num_tokens == sum(len(window) - 1 for window in document)


@pytest.mark.parametrize(("name", "rotation"), [*((name, 0) for name in FORMATS if name != "none"), ("lobcq", 64), ("nf4", 32)])
def test_replaced_layers_compute_what_the_format_says(model, name, rotation):
    quantization = resolved_format(name, rotation=rotation)
    wires = {target: quantization.encode(model.get_submodule(target).weight) for target in
             ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")}  # fmt: skip
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    both, weights, activations = (copy.deepcopy(model) for _ in range(3))
    replace_linears(both, quantization, wires)
    replace_linears(weights, quantization, wires, activations=False)
    replace_linears(activations, quantization, wires, weights=False)
    for target, wire in wires.items():
        layer = model.get_submodule(target)
        bias = 0.0 if layer.bias is None else layer.bias
        rounded = decoded_activations(quantization, x)
        for changed, left, right in (
            (weights, x, quantization.decode(wire)), (activations, rounded, layer.weight),
            (both, rounded, quantization.decode(wire)),
        ):  # fmt: skip
            # whole-number products against float ones: float32 sums of 128 terms of size 1
            torch.testing.assert_close(changed.get_submodule(target)(x), left @ right.T + bias, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(both.get_submodule(target)(x), quantization.linear(x, wire, layer.bias))
    untouched = "model.layers.0.mlp.up_proj"
    assert torch.equal(both.get_submodule(untouched)(x), model.get_submodule(untouched)(x))


def jackknife(statistic, samples):
    """Standard error of a statistic of rows."""
    count = len(samples)
    left_out = [statistic(samples[:i] + samples[i + 1 :]) for i in range(count)]
    mean = sum(left_out) / count
    return math.sqrt((count - 1) / count * sum((value - mean) ** 2 for value in left_out))


def test_standard_errors_agree_with_the_jackknife():
    rng = random.Random(1)
    samples = []
    for _ in range(400):
        tokens, hardness = rng.randrange(20, 200), rng.gauss(2.0, 0.5)
        noise = [rng.gauss(0.0, 0.1) for _ in range(2)]
        samples.append((tokens, tokens * hardness, tokens * (hardness + 0.05 + noise[0]), tokens * (hardness + 0.1 + noise[1])))

    def losses(rows, column):
        return [DocumentLoss(loss=row[column], num_tokens=row[0], divergence=0.0) for row in rows]

    def ppl(rows, column):
        return math.exp(sum(row[column] for row in rows) / sum(row[0] for row in rows))

    base, small, large = (losses(samples, column) for column in (1, 2, 3))
    cases = [
        (perplexity(base), lambda rows: ppl(rows, 1)),
        (increase(small, base), lambda rows: ppl(rows, 2) - ppl(rows, 1)),
        (ratio(increase(small, base), increase(large, base)),
         lambda rows: (ppl(rows, 2) - ppl(rows, 1)) / (ppl(rows, 3) - ppl(rows, 1))),
    ]  # fmt: skip
    for estimate, statistic in cases:
        assert estimate.value == pytest.approx(statistic(samples))
        assert estimate.standard_error == pytest.approx(jackknife(statistic, samples), rel=0.02)  # first order against leaving out
    assert cases[1][0].standard_error < 0.3 * cases[0][0].standard_error  # pairing takes the documents' own spread out


def test_a_journal_goes_on_where_it_was_cut_and_forgets_another_question(tmp_path):
    path, asked = tmp_path / "a" / "int8.jsonl", []

    def ask(format, numbers):
        def measure(skip):
            asked.append(skip)
            return (DocumentLoss(loss=float(i), num_tokens=i + 1, divergence=0.0) for i in numbers[skip:])

        return [loss.loss for loss in journaled_losses(path, {"format": format}, [[[i, 0]] for i in numbers], measure)]

    assert ask("int8", [0, 1, 2, 3, 4]) == ask("int8", [0, 1, 2, 3, 4]) == [0, 1, 2, 3, 4] and asked == [0]
    text = path.read_text()
    path.write_text(text[: text.index('"loss": 3') + 8])  # killed in the middle of a line
    assert ask("int8", [0, 1, 2, 3, 4]) == [0, 1, 2, 3, 4] and asked == [0, 3] and path.read_text() == text
    assert ask("int8", [0, 1, 2]) == [0, 1, 2] and asked == [0, 3] and path.read_text() == text
    assert ask("int8", [0, 1, 2, 3, 4, 5]) == [0, 1, 2, 3, 4, 5] and asked == [0, 3, 5]  # more documents than before
    assert ask("int8", [0, 1, 7]) == [0, 1, 7] and asked == [0, 3, 5, 2]  # another document
    assert ask("fp8", [0, 1, 7]) == [0, 1, 7] and asked == [0, 3, 5, 2, 0]
    before = path.read_text()
    with pytest.raises(RuntimeError):  # a measurement of another question that does not start
        journaled_losses(path, {"format": "int4"}, [[[0, 0]]], fails)
    assert path.read_text() == before


def fails(skip):
    raise RuntimeError("not enough memory")
    yield
