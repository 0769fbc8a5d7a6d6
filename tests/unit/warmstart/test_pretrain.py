"""Pretraining that is interrupted is the same pretraining."""

from dataclasses import replace

import pytest
import torch

from qurl.warmstart import model_config, new_model, train_tokenizer
from qurl.warmstart.pretrain import PretrainConfig, pretrain

CONFIG = PretrainConfig(num_tokens=40 * 64, row_tokens=32, batch_rows=2, learning_rate=3e-3, save_every_steps=7)


@pytest.fixture(scope="module")
def setting():
    """A model factory and documents of a simple language."""
    texts = [f"{a}+{b}={a + b}" for a in range(12) for b in range(12)]
    tokenizer = train_tokenizer(texts, 300)
    documents = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts]
    return lambda: new_model(model_config(tokenizer, hidden_size=32, num_layers=1), seed=0), documents


class Stop(Exception):
    pass


def test_a_run_that_stops_half_way_reaches_the_same_weights(setting, tmp_path):
    make, documents = setting
    straight, stopped = make(), make()
    losses = {}
    last = pretrain(straight, documents, CONFIG, tmp_path / "a.pt", losses.__setitem__)
    assert len(losses) == 40 and last < losses[1] - 1.0

    def stop(step, loss):
        if step == 24:
            raise Stop

    with pytest.raises(Stop):
        pretrain(stopped, documents, CONFIG, tmp_path / "b.pt", stop)
    resumed = make()
    steps = []
    assert pretrain(resumed, documents, CONFIG, tmp_path / "b.pt", lambda step, loss: steps.append(step)) == last
    assert steps == list(range(22, 41))  # from the state of step 21
    for name, weight in straight.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_the_length_may_change_until_the_learning_rate_falls(setting, tmp_path):
    make, documents = setting
    shorter = replace(CONFIG, num_tokens=20 * 64)

    def stop_at(last):
        def stop(step, loss):
            if step == last:
                raise Stop

        return stop

    straight, changed = make(), make()
    pretrain(straight, documents, shorter, tmp_path / "a.pt")
    with pytest.raises(Stop):
        pretrain(make(), documents, CONFIG, tmp_path / "b.pt", stop_at(15))
    pretrain(changed, documents, shorter, tmp_path / "b.pt")
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), changed.parameters(), strict=True))
    with pytest.raises(Stop):
        pretrain(make(), documents, CONFIG, tmp_path / "c.pt", stop_at(22))
    for other in (shorter, replace(CONFIG, seed=1)):
        with pytest.raises(ValueError, match="the state of another pretraining"):
            pretrain(make(), documents, other, tmp_path / "c.pt")
