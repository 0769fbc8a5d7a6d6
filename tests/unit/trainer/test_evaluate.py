"""Metrics of the evaluation during training."""

from __future__ import annotations

import pytest
from test_training_batch import scored

from qurl.evaluation.record import record_of
from qurl.evaluation.summary import summarize
from qurl.observability.metrics import reduce_metrics
from qurl.trainer.batch import rollout_metrics
from qurl.trainer.evaluate import dataset_metrics


@pytest.mark.parametrize("wrong", [0.0, -1.0])
def test_avg_at_k_is_an_accuracy_and_errors_are_wrong(wrong):
    groups = [scored([1.0, wrong, wrong, None]), scored([1.0, 1.0, 1.0, 1.0], lengths=[4] * 4), scored([wrong] * 4)]
    assert dataset_metrics("aime", groups, vote=None) == {
        "eval/aime/avg_at_k": pytest.approx((1 / 4 + 1 + 0) / 3),
        "eval/aime/pass_at_k": pytest.approx(2 / 3),
        "eval/aime/response_length_mean": pytest.approx((2 + 4 + 2) / 3),
        "eval/aime/error_count": 1.0,
    }
    assert reduce_metrics([rollout_metrics(groups, version=3)])["accuracy/train"] == pytest.approx(5 / 11)


def test_one_sample_has_no_majority_and_no_other_pass_at_k():
    assert set(dataset_metrics("a", [scored([-1.0])], vote=str)) == {
        "eval/a/avg_at_k", "eval/a/response_length_mean", "eval/a/error_count",
    }  # fmt: skip


def test_training_and_the_eval_command_report_the_same_figures():
    groups = [scored([1.0, -1.0, None], name="a"), scored([1.0, 1.0, -1.0], name="b"), scored([-1.0] * 3, name="c")]
    during = dataset_metrics("x", groups, vote=lambda text: "same")
    after = summarize([record_of("x", group, lambda text: "same") for group in groups], ks=[3], has_votes=True, seed=0)
    assert during["eval/x/avg_at_k"] == pytest.approx(after["avg_at_k"]["value"])
    assert during["eval/x/pass_at_k"] == pytest.approx(after["pass_at_k"]["3"]["value"])
    assert during["eval/x/maj_at_k"] == pytest.approx(after["maj_at_k"]["value"]) == pytest.approx((1 / 3 + 2 / 3) / 3)
    assert during["eval/x/error_count"] == after["error_count"] == 1
