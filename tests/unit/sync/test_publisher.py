"""qurl.sync.publisher: the whole protocol, over local engines."""

import asyncio
import threading

import pytest
from sync_cases import LocalEngine, encoded, local_config, make_sender, make_weights, nudge, same_bits

from qurl.observability.metrics import reduce_metrics
from qurl.sync import SyncError, merge_send_reports, publish


class LocalLearner:
    """Learner ranks that are threads."""

    def __init__(self, num_ranks=2, **options):
        self.senders = [make_sender(rank=rank, world_size=num_ranks, **options) for rank in range(num_ranks)]
        self.weights = make_weights()
        self.calls = []

    def share(self, rank):
        return iter(list(self.weights.items())[rank :: len(self.senders)])

    async def send_weights(self, version, engines, full):
        self.calls.append((version, list(engines), full))
        sends = [
            asyncio.to_thread(sender.send, version, self.share(rank), engines, full) for rank, sender in enumerate(self.senders)
        ]
        return merge_send_reports(await asyncio.gather(*sends))


def fail_first(number):
    """A tamper function that flips a bit of the first `number` buckets it sees."""
    left = [number]

    def flip(bucket):
        if left[0]:
            left[0] -= 1
            with open(bucket.payload.path, "r+b") as file:
                first = file.read(1)[0]
                file.seek(0)
                file.write(bytes([first ^ 1]))
        return bucket

    return flip


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 120))


def test_all_engines_hold_the_published_weights_and_the_metrics_say_what_it_cost():
    learner, engines = LocalLearner(), [LocalEngine() for _ in range(3)]
    report = run(publish(1, learner, engines, config=local_config()))
    assert report.failed_engines == [] and learner.calls == [(1, engines, False)]
    for engine in engines:
        assert engine.receiver.version == 1
        assert same_bits(engine.installer.tensors, encoded(learner.weights))
    metrics = reduce_metrics([report.metrics])
    wire_bytes = sum(tensor.nbytes for tensor in encoded(learner.weights).values())
    assert metrics["sync/weight_version"] == 1 and metrics["sync/retry_count"] == 0
    assert wire_bytes <= metrics["sync/bytes"] < wire_bytes + 64 * len(encoded(learner.weights))
    assert min(metrics[f"sync/{stage}_s"] for stage in ("encode", "transfer", "install")) > 0
    assert "sync/changed_code_fraction" not in metrics and metrics["quantization/sqnr_min_db"] > 30
    learner.weights = nudge(learner.weights, seed=1)
    metrics = reduce_metrics([run(publish(2, learner, engines, config=local_config())).metrics])
    assert 0 < metrics["sync/changed_code_fraction"] < 0.05


def test_an_engine_that_rejects_gets_the_whole_update_again_while_the_others_are_done():
    """The bucket is damaged for its first reader only: the other engine reads it through another file."""
    learner = LocalLearner(num_ranks=1, delta=True)
    healthy, failing = LocalEngine(), LocalEngine()
    run(publish(1, learner, [healthy, failing], config=local_config()))

    def reject_once(bucket):
        failing.tamper = None
        raise SyncError("a bit flipped")

    failing.tamper = reject_once
    learner.weights = nudge(learner.weights, seed=1)
    report = run(publish(2, learner, [healthy, failing], config=local_config()))
    assert report.failed_engines == []
    assert learner.calls[1:] == [(2, [healthy, failing], False), (2, [failing], True)]
    assert healthy.installer.events.count("begin") == 2 and failing.installer.events.count("begin") == 3
    for engine in (healthy, failing):
        assert engine.receiver.version == 2 and same_bits(engine.installer.tensors, encoded(learner.weights))
    metrics = reduce_metrics([report.metrics])
    assert metrics["sync/retry_count"] == 1
    assert metrics["sync/changed_code_fraction"] > 0  # of the first attempt, not of the comparison with itself


@pytest.mark.parametrize("max_retries", [0, 2])
def test_an_engine_that_keeps_rejecting_is_reported_after_max_retries(max_retries):
    learner, healthy, failing = LocalLearner(num_ranks=1), LocalEngine(), LocalEngine(tamper=lambda bucket: None)
    report = run(publish(1, learner, [failing, healthy], config=local_config(max_retries=max_retries)))
    assert report.failed_engines == [failing] and len(report.errors) == 1 and report.errors[0].startswith("SyncError: ")
    assert healthy.receiver.version == 1 and not failing.receiver.is_ready
    assert len(learner.calls) == 1 + max_retries
    assert reduce_metrics([report.metrics])["sync/retry_count"] == max_retries


def test_a_bit_flipped_in_shared_memory_is_repaired_by_the_second_attempt():
    learner, engine = LocalLearner(), LocalEngine(tamper=fail_first(1))
    report = run(publish(1, learner, [engine], config=local_config()))
    assert report.failed_engines == [] and len(learner.calls) == 2
    assert same_bits(engine.installer.tensors, encoded(learner.weights))


@pytest.mark.parametrize("step", ["begin_weight_update", "receive_bucket", "commit_weight_update"])
def test_an_engine_that_hangs_is_given_up_without_a_retry(step):
    released = threading.Event()
    learner, healthy, hanging = LocalLearner(num_ranks=1, timeout_s=0.4), LocalEngine(), LocalEngine()
    getattr(hanging, step).function = lambda *args: released.wait(60)
    report = run(publish(1, learner, [hanging, healthy], config=local_config(timeout_s=0.4)))
    released.set()
    assert report.failed_engines == [hanging] and report.errors == [""] and len(learner.calls) == 1
    assert healthy.receiver.version == 1 and same_bits(healthy.installer.tensors, encoded(learner.weights))


def test_without_any_engine_left_nothing_is_sent_and_all_are_reported():
    def dead(*args):
        raise OSError("the process is gone")

    learner, engines = LocalLearner(), [LocalEngine(), LocalEngine()]
    for engine in engines:
        engine.begin_weight_update.function = dead
    report = run(publish(1, learner, engines, config=local_config()))
    assert report.failed_engines == engines and learner.calls == []
    assert reduce_metrics([run(publish(1, learner, [], config=local_config())).metrics])["sync/weight_version"] == 1


def test_ranks_that_send_the_same_tensor_are_an_error_and_no_engine_becomes_ready():
    learner, engine = LocalLearner(), LocalEngine()
    learner.share = lambda rank: iter(list(learner.weights.items())[rank:])
    with pytest.raises(SyncError, match="more than one rank"):
        run(publish(1, learner, [engine], config=local_config()))
    assert not engine.receiver.is_ready
