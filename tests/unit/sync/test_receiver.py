"""qurl.sync.receiver: what an engine accepts and what it refuses."""

from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from sync_cases import RecordingInstaller
from torch import Tensor

from qurl.sync import SyncError, WeightReceiver
from qurl.sync.bucket import WireTensor, describe, lay_out, pack


@dataclass
class Inline:
    """A payload in memory."""

    buffer: Tensor
    opened: int = 0

    @contextmanager
    def open(self, links):
        self.opened += 1
        yield self.buffer


def bucket_of(tensors, version=1, index=0, rank=0):
    wire = [WireTensor(record=describe(name, tensor), pieces=(tensor,), delta=None) for name, tensor in tensors.items()]
    bucket, pieces = lay_out(wire, version=version, sender_rank=rank, index=index, keep_base=False)
    buffer = torch.zeros(bucket.num_bytes, dtype=torch.uint8)
    pack(pieces, buffer)
    return replace(bucket, payload=Inline(buffer))


def weights(seed):
    generator = torch.Generator().manual_seed(seed)
    return {f"w{k}": torch.randn(6, 5, generator=generator).to(torch.bfloat16) for k in range(6)}


def buckets_of(tensors, version=1, rank=0):
    names = list(tensors)
    return [bucket_of({n: tensors[n] for n in names[i : i + 2]}, version, i // 2, rank) for i in range(0, len(names), 2)]


def manifest_of(buckets):
    return [entry.record for bucket in buckets for entry in bucket.entries]


def bring_to(receiver, version, tensors):
    buckets = buckets_of(tensors, version)
    receiver.begin(version)
    for bucket in buckets:
        receiver.receive(bucket)
    return receiver.commit(version, manifest_of(buckets))


@pytest.fixture
def installer():
    return RecordingInstaller()


@pytest.fixture
def receiver(installer):
    """Ready at version 1."""
    receiver = WeightReceiver(installer)
    assert not receiver.is_ready
    bring_to(receiver, 1, weights(1))
    assert (receiver.version, receiver.is_ready) == (1, True)
    return receiver


def assert_rejected_until_a_complete_update(receiver, installer):
    assert (receiver.version, receiver.is_ready) == (None, False)
    report = bring_to(receiver, 9, weights(9))
    assert (receiver.version, receiver.is_ready) == (9, True)
    assert (report.num_tensors, report.num_bytes) == (6, 6 * 60) and report.install_s > 0
    assert all(installer.tensors[name].equal(tensor) for name, tensor in weights(9).items())


def test_buckets_may_come_in_any_order(receiver, installer):
    buckets = buckets_of(weights(2), 2)
    receiver.begin(2)
    assert (receiver.version, receiver.is_ready) == (None, False)  # a mixture from here on
    for bucket in reversed(buckets):
        receiver.receive(bucket)
    receiver.commit(2, manifest_of(buckets))
    assert receiver.version == 2
    assert installer.events[-5:] == ["begin", "install", "install", "install", "finish"]
    assert all(installer.tensors[name].equal(tensor) for name, tensor in weights(2).items())


@pytest.mark.parametrize("place", [0, 59, 64, 123])
def test_a_bit_flipped_in_flight_is_refused_before_installation(receiver, installer, place):
    bucket = buckets_of(weights(2), 2)[0]
    bucket.payload.buffer[place] ^= 0x10
    receiver.begin(2)
    with pytest.raises(SyncError, match="arrived damaged"):
        receiver.receive(bucket)
    assert installer.events[-1] == "begin"
    assert_rejected_until_a_complete_update(receiver, installer)


def test_a_missing_bucket_is_named_at_commit(receiver, installer):
    buckets = buckets_of(weights(2), 2)
    receiver.begin(2)
    for bucket in buckets[1:]:
        receiver.receive(bucket)
    with pytest.raises(SyncError, match="2 tensors never arrived .w0, w1."):
        receiver.commit(2, manifest_of(buckets))
    assert installer.events[-1] == "install"
    assert_rejected_until_a_complete_update(receiver, installer)


def test_two_tensors_swapped_in_the_buffer_are_refused(receiver, installer):
    bucket = buckets_of(weights(2), 2)[0]
    first, second = bucket.entries
    receiver.begin(2)
    with pytest.raises(SyncError, match="w0 arrived damaged"):
        receiver.receive(replace(bucket, entries=(replace(first, offset=second.offset), replace(second, offset=first.offset))))
    assert_rejected_until_a_complete_update(receiver, installer)


def test_two_tensors_sent_under_each_others_name_are_refused(receiver, installer):
    good, tensors = buckets_of(weights(2), 2), weights(2)
    tensors["w0"], tensors["w5"] = tensors["w5"], tensors["w0"]
    receiver.begin(2)
    for bucket in buckets_of(tensors, 2):
        receiver.receive(bucket)
    with pytest.raises(SyncError, match="2 tensors arrived with another content, dtype or shape .w0, w5."):
        receiver.commit(2, manifest_of(good))
    assert_rejected_until_a_complete_update(receiver, installer)


@pytest.mark.parametrize("change", [{"dtype": "float16"}, {"shape": (5, 6)}])
def test_right_bytes_under_another_dtype_or_shape_are_refused(receiver, installer, change):
    buckets = buckets_of(weights(2), 2)
    manifest = manifest_of(buckets)
    receiver.begin(2)
    for bucket in buckets:
        receiver.receive(bucket)
    with pytest.raises(SyncError, match="another content, dtype or shape .w3."):
        receiver.commit(2, [replace(r, **change) if r.name == "w3" else r for r in manifest])
    assert_rejected_until_a_complete_update(receiver, installer)


@pytest.mark.parametrize("edit", [lambda m: m[:-1], lambda m: [*m, m[0]], lambda m: []])
def test_a_manifest_that_lacks_or_repeats_a_tensor_is_refused(receiver, installer, edit):
    buckets = buckets_of(weights(2), 2)
    receiver.begin(2)
    for bucket in buckets:
        receiver.receive(bucket)
    with pytest.raises(SyncError, match="not in the manifest|listed twice"):
        receiver.commit(2, edit(manifest_of(buckets)))
    assert_rejected_until_a_complete_update(receiver, installer)


def test_an_update_of_nothing_is_refused(receiver, installer):
    receiver.begin(2)
    with pytest.raises(SyncError, match="manifest is empty"):
        receiver.commit(2, [])
    assert_rejected_until_a_complete_update(receiver, installer)


def test_a_bucket_of_another_version_is_refused_but_drained(receiver, installer):
    receiver.begin(2)
    bucket = buckets_of(weights(2), 1)[0]
    with pytest.raises(SyncError, match="under way is of version 2"):
        receiver.receive(bucket)
    assert bucket.payload.opened == 1
    assert_rejected_until_a_complete_update(receiver, installer)


def test_a_commit_of_another_version_is_refused(receiver, installer):
    buckets = buckets_of(weights(2), 2)
    receiver.begin(2)
    for bucket in buckets:
        receiver.receive(bucket)
    with pytest.raises(SyncError, match="under way is of version 2"):
        receiver.commit(3, manifest_of(buckets))
    assert_rejected_until_a_complete_update(receiver, installer)


@pytest.mark.parametrize(
    "step", [lambda r: r.receive(buckets_of(weights(1))[0]), lambda r: r.commit(1, manifest_of(buckets_of(weights(1))))]
)
def test_nothing_is_accepted_before_begin(receiver, installer, step):
    with pytest.raises(SyncError, match="no weight update has begun"):
        step(receiver)
    assert_rejected_until_a_complete_update(receiver, installer)


def test_a_bucket_that_comes_twice_is_refused(receiver, installer):
    buckets = buckets_of(weights(2), 2)
    receiver.begin(2)
    receiver.receive(buckets[0])
    with pytest.raises(SyncError, match="w0 came twice"):
        receiver.receive(buckets[0])
    assert_rejected_until_a_complete_update(receiver, installer)


def test_a_tensor_twice_in_a_bucket_is_refused(receiver, installer):
    bucket = buckets_of(weights(2), 2)[0]
    receiver.begin(2)
    with pytest.raises(SyncError, match="w0 came twice"):
        receiver.receive(replace(bucket, entries=(bucket.entries[0], bucket.entries[0])))
    assert_rejected_until_a_complete_update(receiver, installer)


def test_after_a_failure_the_rest_of_the_update_is_refused_with_the_first_reason(receiver, installer):
    buckets = buckets_of(weights(2), 2)
    buckets[0].payload.buffer[3] ^= 1
    receiver.begin(2)
    with pytest.raises(SyncError):
        receiver.receive(buckets[0])
    for step in (lambda: receiver.receive(buckets[1]), lambda: receiver.commit(2, manifest_of(buckets))):
        with pytest.raises(SyncError, match="rejected before .*w0 arrived damaged"):
            step()
    assert_rejected_until_a_complete_update(receiver, installer)


@pytest.mark.parametrize("method", ["begin", "install", "finish"])
def test_an_installer_that_raises_leaves_the_receiver_not_ready(receiver, installer, method, monkeypatch):
    def fail(*args):
        raise RuntimeError("no such parameter")

    with monkeypatch.context() as patch:
        patch.setattr(installer, method, fail)
        with pytest.raises(RuntimeError, match="no such parameter"):
            bring_to(receiver, 2, weights(2))
        assert not receiver.is_ready
        with pytest.raises(SyncError, match="no such parameter"):
            receiver.commit(2, manifest_of(buckets_of(weights(2), 2)))
    assert_rejected_until_a_complete_update(receiver, installer)


def test_an_update_broken_off_by_a_new_one_leaves_nothing_behind(receiver, installer):
    receiver.begin(2)
    receiver.receive(buckets_of(weights(2), 2)[0])
    assert_rejected_until_a_complete_update(receiver, installer)
