"""qurl.sync.sender with real receivers behind it."""

import logging
import math
import threading
import weakref
from pathlib import Path

import pytest
import torch
from sync_cases import (
    LINEARS,
    LocalEngine,
    encoded,
    local_config,
    make_sender,
    make_weights,
    nudge,
    same_bits,
    update,
)

from qurl.config import SyncConfig
from qurl.quantization import FORMATS
from qurl.quantization.axbxp import ALL_BLOCKS, AxBxP
from qurl.sync import SyncError, WeightSender, merge_send_reports
from qurl.sync.bucket import ALIGNMENT
from qurl.sync.code_changes import CodeChanges, interval_on
from qurl.sync.transports.base import Delivery


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("bucket_bytes", [1, 20_000, 1 << 30])
def test_an_engine_holds_exactly_the_encoded_weights(name, bucket_bytes):
    engine, weights = LocalEngine(), make_weights()
    report = update(make_sender(name, bucket_bytes=bucket_bytes), engine, 1, weights)
    assert same_bits(engine.installer.tensors, encoded(weights, name))
    padded = sum(-(-r.num_bytes // ALIGNMENT) * ALIGNMENT for r in report.records)
    assert report.num_bytes == padded == sum(bucket.num_bytes for bucket in engine.buckets)
    assert {r.name: r.dtype for r in report.records} == {
        key: str(tensor.dtype).removeprefix("torch.") for key, tensor in encoded(weights, name).items()
    }
    assert report.encode_s > 0 and report.transfer_s > 0


def test_buckets_are_bounded_and_keep_the_tensors_of_a_weight_together():
    engine = LocalEngine()
    update(make_sender(bucket_bytes=14_000), engine, 1, make_weights())
    assert [bucket.index for bucket in engine.buckets] == list(range(len(engine.buckets)))
    for bucket in engine.buckets:
        names = [entry.record.name for entry in bucket.entries]
        modules = {name.rpartition(".")[0] for name in names}
        assert bucket.num_bytes <= 14_000
        assert all({f"{m}.weight", f"{m}.weight_scale"} <= set(names) for m in modules if m in LINEARS)


@pytest.mark.parametrize("delta", [False, True])
def test_full_precision_sends_what_an_engine_without_quantization_holds(delta):
    sender, engine, weights = make_sender("int8", delta=delta), LocalEngine(), make_weights()
    for version, is_on in enumerate([False, True, True, False, False], start=1):
        if version in (2, 4):
            engine = LocalEngine()
        weights = nudge(weights, seed=version)
        sender.set_fallback(FORMATS["none"] if is_on else None)
        assert sender.is_fallen_back is is_on
        report = update(sender, engine, version, weights)
        assert same_bits(engine.installer.tensors, encoded(weights, "none" if is_on else "int8"))
        assert (report.sqnr_min_db is None) is is_on
        assert (report.num_codes > 0) is (version == 5)  # after a switch there is nothing to compare with
        weight, sent = weights[f"{LINEARS[0]}.weight"], encoded(weights, "none" if is_on else "int8")
        codes = {suffix: sent.get(f"{LINEARS[0]}.{suffix}") for suffix in ("weight", "weight_scale")}
        assert sender.decoded(LINEARS[0], weight).equal(FORMATS["none" if is_on else "int8"].decode(codes))
        x = torch.eye(weight.shape[1])
        assert sender.linear(LINEARS[0], x, weight, None).equal(FORMATS["int8"].linear(x, FORMATS["int8"].encode(weight)))


@pytest.mark.parametrize("delta", [False, True])
def test_a_raised_precision_decodes_as_engines_then_hold_it_and_changes_nothing_else(delta):
    def sender_after(fallbacks):
        """The same updates with these fallbacks; its engine and the reports."""
        sender, engine, weights, reports = make_sender("axbxp", delta=delta), LocalEngine(), make_weights(), []
        for version, each in enumerate(fallbacks, start=1):
            weights = nudge(weights, seed=version)
            sender.set_fallback(each)
            reports.append(update(sender, engine, version, weights))
        assert same_bits(engine.installer.tensors, encoded(weights, "int8"))
        return sender, reports, weights[f"{LINEARS[0]}.weight"]

    configured, raised = FORMATS["axbxp"], AxBxP("axbxp", ALL_BLOCKS)
    plain, reports, weight = sender_after([None] * 4)
    there, while_raised, _ = sender_after([None, raised, raised, raised])
    back, returned, _ = sender_after([None, raised, raised, None])
    wire, x = configured.encode(weight), torch.eye(weight.shape[1])
    for sender, held in ((plain, configured), (there, raised), (back, configured)):
        assert sender.is_fallen_back is (held is raised)
        assert sender.decoded(LINEARS[0], weight).equal(held.decode(wire))
        assert sender.linear(LINEARS[0], x, weight, None).equal(configured.linear(x, wire))
    assert there.decoded(LINEARS[0], weight).equal(FORMATS["int8"].decode(wire))
    sent = [[(r.num_bytes, r.num_codes, r.num_changed_codes) for r in each] for each in (reports, while_raised, returned)]
    assert sent[0] == sent[1] == sent[2] and sent[0][1][1] > 0  # what changed is told through a switch
    quality = [[r.sqnr_min_db for r in each] for each in (reports, while_raised, returned)]
    assert min(quality[1][1:]) > 38 > 30 > max(quality[0])
    assert quality[2] == [*quality[1][:3], pytest.approx(quality[0][3], abs=0.5)]


def test_only_floating_point_tensors_are_cast():
    engine = LocalEngine()
    update(make_sender(), engine, 1, {"steps": torch.arange(3), "norm.bias": torch.ones(2, dtype=torch.float64)})
    assert {name: t.dtype for name, t in engine.installer.tensors.items()} == {"steps": torch.int64, "norm.bias": torch.bfloat16}


def test_bfloat16_weights_are_encoded_in_float32():
    engine = LocalEngine()
    weights = {name: tensor.bfloat16() for name, tensor in make_weights().items()}
    update(make_sender("fp8"), engine, 1, weights)
    assert same_bits(engine.installer.tensors, encoded({k: v.float() for k, v in weights.items()}, "fp8"))


@pytest.mark.parametrize("name", list(FORMATS))
def test_changes_leave_an_engine_with_the_same_bits_as_whole_tensors(name):
    sender, engine, weights = make_sender(name, delta=True), LocalEngine(), make_weights()
    whole = update(sender, engine, 1, weights).num_bytes
    for version in range(2, 6):
        weights = nudge(weights, seed=version)
        report = update(sender, engine, version, weights)
        assert report.num_bytes < 0.6 * whole
        assert any(entry.delta for bucket in engine.buckets for entry in bucket.entries if bucket.version == version)
        assert same_bits(engine.installer.tensors, encoded(weights, name))
    report = update(sender, engine, 6, weights)
    assert (report.num_bytes, report.num_changed_codes) == (0, 0)  # nothing moved, and that is verified too
    assert engine.receiver.version == 6


def test_a_tensor_that_changed_a_lot_travels_whole():
    sender, engine = make_sender(delta=True), LocalEngine()
    update(sender, engine, 1, make_weights(1))
    update(sender, engine, 2, make_weights(2))
    assert same_bits(engine.installer.tensors, encoded(make_weights(2)))
    assert not any(e.delta for b in engine.buckets for e in b.entries if e.record.dtype == "int8")


def test_an_engine_without_the_base_version_refuses_changes_and_recovers_with_whole_tensors():
    sender, old, new = make_sender(delta=True), LocalEngine(), LocalEngine()
    update(sender, old, 1, make_weights())
    moved = nudge(make_weights(), seed=1)
    for engine in (old, new):
        engine.begin_weight_update.remote(2).future().result()
    report = sender.send(2, iter(moved.items()), [old, new])
    assert list(report.failed) == [1] and "holds none" in report.failed[1] and not report.unresponsive
    old.commit_weight_update.remote(2, report.records).future().result()
    update(sender, new, 2, moved, full=True)
    again = nudge(moved, seed=2)
    for engine in (old, new):
        engine.begin_weight_update.remote(3).future().result()
    report = sender.send(3, iter(again.items()), [old, new])
    assert not report.failed
    for engine in (old, new):
        engine.commit_weight_update.remote(3, report.records).future().result()
        assert same_bits(engine.installer.tensors, encoded(again))


def test_changes_to_a_version_whose_content_differs_are_refused():
    """The engine's copy is of version 1 but not the one that the sender means."""
    sender, other, engine = make_sender(delta=True), make_sender(delta=True), LocalEngine()
    update(sender, LocalEngine(), 1, make_weights())
    update(other, engine, 1, nudge(make_weights(), seed=7))
    with pytest.raises(AssertionError, match="arrived damaged"):
        update(sender, engine, 2, nudge(make_weights(), seed=1))
    assert not engine.receiver.is_ready
    with pytest.raises(AssertionError, match="holds none"):
        update(sender, engine, 3, nudge(make_weights(), seed=1))
    update(sender, engine, 4, make_weights(), full=True)
    assert same_bits(engine.installer.tensors, encoded(make_weights()))


def test_an_update_that_the_learner_broke_off_is_no_base_for_changes():
    sender, engine = make_sender(delta=True), LocalEngine()
    update(sender, engine, 1, make_weights())

    def broken():
        yield from list(nudge(make_weights(), seed=1).items())[:3]
        raise RuntimeError("a rank died")

    with pytest.raises(RuntimeError, match="a rank died"):
        sender.send(2, broken(), [engine])
    moved = nudge(make_weights(), seed=2)
    update(sender, engine, 3, moved)
    assert not any(entry.delta for bucket in engine.buckets if bucket.version == 3 for entry in bucket.entries)
    assert same_bits(engine.installer.tensors, encoded(moved))


@pytest.mark.parametrize("delta", [False, True])
def test_changed_codes_are_counted_as_a_loop_over_the_encodings_does(delta):
    sender, engine, weights = make_sender(delta=delta), LocalEngine(), make_weights()
    first = update(sender, engine, 1, weights)
    assert (first.num_codes, first.num_changed_codes) == (0, 0)
    moved = nudge(weights, seed=3)
    report = update(sender, engine, 2, moved)
    before, after = encoded(weights), encoded(moved)
    pairs = [(before[f"{m}.weight"].flatten().tolist(), after[f"{m}.weight"].flatten().tolist()) for m in LINEARS]
    assert report.num_codes == sum(len(old) for old, _ in pairs)
    assert report.num_changed_codes == sum(a != b for old, new in pairs for a, b in zip(old, new, strict=True)) > 0


@pytest.mark.parametrize("interval", [2, 3, 4])
def test_with_an_interval_each_update_compares_some_matrices_and_they_take_turns(interval):
    sender, engine, weights = make_sender(track_changes_interval=interval), LocalEngine(), make_weights()
    update(sender, engine, 1, weights)
    total = changed = expected_changed = 0
    for version in range(2, 2 + interval):
        moved = nudge(weights, seed=version)
        report = update(sender, engine, version, moved)
        due = [m for position, m in enumerate(LINEARS) if (position + version) % interval == 0]
        before, after = (encoded(w) for w in (weights, moved))
        expected = sum(int((before[f"{m}.weight"] != after[f"{m}.weight"]).sum()) for m in due)
        assert (report.num_codes, report.num_changed_codes) == (len(due) * 48 * 128, expected)
        total, changed, expected_changed = total + report.num_codes, changed + report.num_changed_codes, expected_changed + expected
        weights = moved
    assert total == len(LINEARS) * 48 * 128 and changed == expected_changed > 0  # every matrix once


def test_codes_are_compared_where_they_are_and_copied_to_the_host_for_deltas_alone(monkeypatch):
    copied, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: (copied.append(tensor.nbytes), cpu(tensor))[1])
    clone, cloned = torch.Tensor.clone, []
    monkeypatch.setattr(torch.Tensor, "clone", lambda tensor: (cloned.append(tensor.nbytes), clone(tensor))[1])
    for delta in (False, True):
        weights, sender = make_weights(), make_sender(delta=delta)
        reports = []
        for version in range(1, 4):
            copied.clear(), cloned.clear()
            reports.append(sender.send(version, iter(weights.items()), []))
            sent = encoded(weights).values()
            assert copied == ([tensor.nbytes for tensor in sent] if delta else [])
            # the copies that the first delta is told from; otherwise the encoding itself is kept
            assert len([size for size in cloned if size == 48 * 128]) == (len(LINEARS) if delta and version == 1 else 0)
            weights = nudge(weights, seed=version)
        assert reports[1].num_codes == len(LINEARS) * 48 * 128 and reports[2].num_changed_codes > 0


def test_an_accelerator_keeps_and_compares_one_matrix_in_eleven():
    assert [interval_on(device, 0) for device in ("cpu", "cuda")] == [1, 11] and interval_on("cuda", 3) == 3
    changes = CodeChanges(0)
    codes = {f"layer.{k}.weight": torch.empty(4, 4, dtype=torch.int8, device="meta") for k in range(33)}
    for version in range(1, 5):
        changes.begin(version)
        for name, tensor in codes.items():
            changes.see(name, tensor)
        assert changes.num_codes == (3 * 16 if version > 1 else 0)
        assert len(changes._kept) == 3


def test_without_tracking_nothing_is_kept_or_counted():
    sender, engine = make_sender(track_changes=False), LocalEngine()
    update(sender, engine, 1, make_weights())
    assert update(sender, engine, 2, make_weights(1)).num_codes == 0


def test_the_reported_sqnr_is_that_of_the_worst_matrix_and_follows_the_weights():
    sender, engine, weights = make_sender(), LocalEngine(), make_weights()

    def worst(weights):
        ratios = []
        for module in LINEARS:
            weight = weights[f"{module}.weight"].double()
            noise = weight - FORMATS["int8"].decode(FORMATS["int8"].encode(weight)).double()
            ratios.append(float(10 * torch.log10(weight.square().sum() / noise.square().sum())))
        return min(ratios)

    assert math.isclose(update(sender, engine, 1, weights).sqnr_min_db, worst(weights), abs_tol=1e-3)  # norms are in float32
    weights[f"{LINEARS[2]}.weight"][:, 0] = 100.0  # an outlier in every row
    reports = [update(sender, engine, version, weights) for version in range(2, 10)]
    assert math.isclose(reports[-1].sqnr_min_db, worst(weights), abs_tol=1e-3)
    assert make_sender("none").send(1, iter(weights.items()), []).sqnr_min_db is None


def test_an_all_zero_weight_is_sent():
    engine = LocalEngine()
    update(make_sender(), engine, 1, {f"{LINEARS[0]}.weight": torch.zeros(4, 4)})
    assert engine.receiver.is_ready


def test_a_failing_engine_drops_out_and_the_others_get_everything(caplog):
    def refuse(bucket):
        raise SyncError("out of memory here")

    engines, weights = [LocalEngine(), LocalEngine(tamper=refuse), LocalEngine()], make_weights()
    for engine in engines:
        engine.begin_weight_update.remote(1).future().result()
    with caplog.at_level(logging.WARNING):
        report = make_sender(max_inflight_buckets=1).send(1, iter(weights.items()), engines)
    assert report.failed == {1: "SyncError: out of memory here"} and report.unresponsive == frozenset()
    assert len(engines[1].buckets) == 1 and len(engines[0].buckets) == len(engines[2].buckets) > 2
    assert sum("engine 1 dropped out" in message for message in caplog.messages) == 1
    for engine in (engines[0], engines[2]):
        engine.commit_weight_update.remote(1, report.records).future().result()
        assert same_bits(engine.installer.tensors, encoded(weights))


def test_an_engine_that_hangs_costs_one_timeout_and_the_others_get_everything():
    released = threading.Event()
    hanging, healthy, weights = LocalEngine(tamper=lambda bucket: released.wait(60) and None), LocalEngine(), make_weights()
    for engine in (hanging, healthy):
        engine.begin_weight_update.remote(1).future().result()
    report = make_sender(timeout_s=0.3).send(1, iter(weights.items()), [hanging, healthy])
    released.set()
    assert report.unresponsive == frozenset({0}) and "sync.timeout_s=0.3" in report.failed[0]
    assert report.transfer_s < 2 * 0.3 + 5  # a second timeout per bucket would add up; 5 s for a loaded machine
    healthy.commit_weight_update.remote(1, report.records).future().result()
    assert same_bits(healthy.installer.tensors, encoded(weights))


def test_weights_are_read_to_the_end_though_every_engine_failed():
    def refuse(bucket):
        raise SyncError("no")

    read = []

    def weights():
        for name, tensor in make_weights().items():
            read.append(name)
            yield name, tensor

    engine = LocalEngine(tamper=refuse)
    report = make_sender(bucket_bytes=1).send(1, weights(), [engine])
    assert read == list(make_weights()) and list(report.failed) == [0]


class CountingTransport:
    """Delivers nothing; an acknowledgement comes when the test says so. Counts buffers alive."""

    def __init__(self, rank, timeout_s):
        self.alive, self.peak_bytes, self.held, self.finished = weakref.WeakSet(), 0, 0, 0
        self.events = []

    def start(self, engines):
        self.events.append("start")

    def send(self, bucket, pieces, receivers):
        buffer = torch.empty(bucket.num_bytes, dtype=torch.uint8)
        self.events.append(f"send {bucket.index}")
        self.alive.add(buffer)
        held = [buffer]
        self.held = max(self.held, len(self.alive))

        def release():
            held.clear()
            self.events.append(f"release {bucket.index}")

        return Delivery(acknowledgements={}, release=release)

    def finish(self):
        self.events.append("finish")


def test_at_most_max_inflight_buckets_and_the_next_one_exist_at_a_time(monkeypatch):
    transport = CountingTransport(0, 1.0)
    monkeypatch.setattr("qurl.sync.sender.make_transport", lambda *args: transport)
    alive: weakref.WeakSet = weakref.WeakSet()
    peak = 0

    def weights():
        nonlocal peak
        for k in range(40):
            tensor = torch.randn(64, 64)
            alive.add(tensor)
            peak = max(peak, len(alive))
            yield f"w{k}", tensor
            del tensor

    config = local_config(bucket_bytes=8192, max_inflight_buckets=2)  # one bfloat16 tensor of 8192 bytes per bucket
    sender = WeightSender(config, FORMATS["none"], frozenset(), torch.bfloat16, 0, 1)
    sender.send(1, weights(), [object()])
    assert transport.held <= 2
    assert peak <= 4  # the one yielded, the one encoded, and what locals of the pipeline still name
    assert transport.events[:6] == ["start", "send 0", "send 1", "release 0", "send 2", "release 1"]
    assert transport.events[-2:] == ["release 39", "finish"] and transport.events.count("finish") == 1


def test_options_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="sync.track_changes=true"):
        make_sender(delta=True, track_changes=False)
    with pytest.raises(ValueError, match="sync.track_changes_interval=-1"):
        make_sender(track_changes_interval=-1)
    with pytest.raises(ValueError, match="sync.bucket_bytes=0"):
        make_sender(bucket_bytes=0)
    with pytest.raises(ValueError, match="sync.transport='carrier_pigeon' is unknown; use one of cuda_ipc, gloo"):
        make_sender(transport="carrier_pigeon").send(1, iter(make_weights().items()), [LocalEngine()])


def test_shares_of_ranks_merge_and_a_tensor_sent_by_two_is_an_error():
    shares = [dict(list(make_weights().items())[k::2]) for k in range(2)]
    engine = LocalEngine()
    engine.begin_weight_update.remote(1).future().result()
    reports = [make_sender(rank=rank, world_size=2).send(1, iter(share.items()), [engine]) for rank, share in enumerate(shares)]
    merged = merge_send_reports(reports)
    engine.commit_weight_update.remote(1, merged.records).future().result()
    assert same_bits(engine.installer.tensors, encoded(make_weights()))
    assert merged.num_bytes == sum(report.num_bytes for report in reports)
    assert merged.encode_s == max(report.encode_s for report in reports)
    with pytest.raises(SyncError, match="more than one rank"):
        merge_send_reports([reports[0], reports[0]])
    with pytest.raises(SyncError, match="no weights"):
        merge_send_reports([make_sender().send(1, iter([]), [])])


def test_the_defaults_are_a_valid_configuration():
    WeightSender(SyncConfig(), FORMATS["none"], frozenset(), torch.float32, 0, 1)
    assert not list(Path("/dev/shm").glob("qurl-sync-nothing-is-written-before-the-first-update*"))
