"""Tokens a second and what is left, from given reports."""

import pytest

from qurl.evaluation.speed import WINDOW_S, Speed


def test_before_anything_was_sampled_nothing_is_promised():
    speed = Speed(10, 200, now=0.0)
    speed.sampled(5.0, 0)
    assert (speed.tokens_per_s, speed.left_s, str(speed)) == (0.0, None, "no tokens yet")


def test_within_a_batch_the_longest_that_it_can_take_is_said():
    speed = Speed(10, 200, now=0.0)
    speed.sampled(10.0, 500)
    assert speed.tokens_per_s == 50 and speed.left_s == (10 * 200 - 500) / 50
    assert str(speed) == "50 tokens/s, at most 0:00:30 left"


def test_problems_that_ended_say_how_long_the_others_are():
    speed = Speed(10, 200, now=0.0)
    speed.finished(4.0, 40)
    speed.finished(5.0, 60)
    assert speed.tokens_per_s == 20  # though no engine was asked yet
    speed.sampled(10.0, 150)
    assert speed.left_s == pytest.approx((8 * 50 - (150 - 100)) / 15)
    assert str(speed) == "15 tokens/s, about 0:00:23 left"
    for _ in range(8):
        speed.finished(10.0, 50)
    assert speed.left_s == 0


def test_the_speed_is_that_of_the_last_seconds():
    speed = Speed(10, 10_000, now=0.0)
    for second in range(1, 101):
        speed.sampled(float(second), 10 * second if second < 50 else 490 + 100 * (second - 49))
    assert speed.tokens_per_s == pytest.approx(100, rel=0.05) and WINDOW_S < 50


def test_a_replaced_engine_takes_nothing_back():
    speed = Speed(10, 100, now=0.0)
    speed.sampled(1.0, 300)
    speed.sampled(2.0, 20)
    assert speed.num_tokens == 300
