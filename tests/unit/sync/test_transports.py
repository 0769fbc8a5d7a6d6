"""qurl.sync.transports: the same contract for every way that works here, and what each must not leave behind."""

import gc
import multiprocessing
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sync_cases import LINEARS, DyingEngine, LocalEngine, encoded, make_sender, make_weights, nudge, same_bits, update

from qurl.sync import TRANSPORTS, SyncError, choose_transport
from qurl.sync.transports import shared_memory
from qurl.sync.transports.shared_memory import SharedMemoryTransport, remove_abandoned


@pytest.fixture
def shared_folder(tmp_path, monkeypatch):
    """Stands for /dev/shm, so that other processes of this machine do not matter."""
    monkeypatch.setattr(shared_memory, "SHARED_MEMORY", tmp_path)
    return tmp_path


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("transport", ["shared_memory", "gloo"])
def test_two_engines_hold_the_same_bits_over_several_updates(transport):
    sender, engines, weights = make_sender(transport=transport), [LocalEngine(), LocalEngine()], make_weights()
    for version in range(1, 4):
        weights = nudge(weights, seed=version)
        for engine in engines:
            engine.begin_weight_update.remote(version).future().result()
        report = sender.send(version, iter(weights.items()), engines)
        assert not report.failed
        for engine in engines:
            engine.commit_weight_update.remote(version, report.records).future().result()
            assert same_bits(engine.installer.tensors, encoded(weights))


def test_gloo_links_are_kept_between_updates_and_follow_the_engines():
    sender, first, second = make_sender(transport="gloo"), LocalEngine(), LocalEngine()
    update(sender, first, 1, make_weights())
    link = sender._transport._links[first]
    update(sender, first, 2, make_weights())
    assert sender._transport._links[first] is link
    update(sender, second, 3, make_weights())
    assert list(sender._transport._links) == [second]
    update(sender, first, 4, make_weights())
    assert first.receiver.version == 4


def test_an_engine_that_rejected_a_bucket_is_reached_again_through_gloo():
    sender, engine = make_sender(transport="gloo"), LocalEngine()
    update(sender, engine, 1, make_weights())
    report = sender.send(2, iter(make_weights().items()), [engine])  # never begun
    assert list(report.failed) == [0] and "no weight update has begun" in report.failed[0]
    update(sender, engine, 3, make_weights(3))
    assert same_bits(engine.installer.tensors, encoded(make_weights(3)))


def test_a_gloo_link_that_broke_is_built_anew():
    def lose_once(bucket):
        engine.tamper = None
        raise OSError("this bucket is never received")

    sender, engine = make_sender(transport="gloo", timeout_s=3.0), LocalEngine()
    update(sender, engine, 1, make_weights())
    engine.tamper = lose_once
    engine.begin_weight_update.remote(2).future().result()
    assert "never received" in sender.send(2, iter(make_weights().items()), [engine]).failed[0]
    update(sender, engine, 3, make_weights(3))
    assert same_bits(engine.installer.tensors, encoded(make_weights(3)))


def test_an_engine_killed_in_mid_bucket_leaves_the_sender_alive_and_its_links_whole():
    sender, dying, healthy = make_sender(transport="gloo"), DyingEngine(), LocalEngine()
    weights = make_weights() | {"model.extra.weight": torch.ones(8 << 20)}  # 16 MiB: more than sockets hold
    for engine in (dying, healthy):
        engine.begin_weight_update.remote(1).future().result()
    report = sender.send(1, iter(weights.items()), [dying, healthy])
    assert list(report.failed) == [0] and "the actor died (exit code -9)" in report.failed[0] and not report.unresponsive
    assert sender._transport._links[dying]._group is None, "what is under way to a dead engine is ended"
    healthy.commit_weight_update.remote(1, report.records).future().result()
    assert same_bits(healthy.installer.tensors, encoded(weights))
    weights, successor = nudge(weights, seed=2), LocalEngine()
    for engine in (healthy, successor):
        update(sender, engine, 2, weights)
        assert same_bits(engine.installer.tensors, encoded(weights))


def test_an_engine_that_is_busy_with_another_rank_keeps_no_other_engine_waiting():
    """Two ranks whose buckets reach two engines in opposite order would wait for each other without end."""
    is_served = threading.Event()

    class Announcing(LocalEngine):
        def _receive(self, bucket):
            super()._receive(bucket)
            is_served.set()

    def wait(bucket):
        assert is_served.wait(15)
        return bucket

    busy, idle = LocalEngine(tamper=wait), Announcing()
    for engine in (busy, idle):
        engine.begin_weight_update.remote(1).future().result()
    assert not make_sender(transport="gloo").send(1, iter(make_weights().items()), [busy, idle]).failed


def test_shared_memory_is_empty_after_each_update_whether_it_succeeded_or_not(shared_folder):
    sender, engine = make_sender(), LocalEngine()
    update(sender, engine, 1, make_weights())
    assert files_below(shared_folder) == []

    def broken():
        yield from list(make_weights().items())[:5]
        raise RuntimeError("a rank died")

    engine.begin_weight_update.remote(2).future().result()
    with pytest.raises(RuntimeError, match="a rank died"):
        sender.send(2, broken(), [engine])
    assert files_below(shared_folder) == []
    del sender
    gc.collect()
    assert list(shared_folder.iterdir()) == []


def test_too_little_shared_memory_is_an_error_before_anything_is_written(shared_folder, monkeypatch):
    def no_space(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_space)
    engine = LocalEngine()
    with pytest.raises(SyncError, match="sync.transport=shared_memory needs .* free; .*sync.bucket_bytes"):
        update(make_sender(), engine, 1, make_weights())
    assert files_below(shared_folder) == [] and engine.buckets == []


def test_a_file_that_is_gone_is_a_sync_error():
    def lose(bucket):
        os.unlink(bucket.payload.path)
        return bucket

    with pytest.raises(AssertionError, match="SyncError: no bucket at .*object_store"):
        update(make_sender(), LocalEngine(tamper=lose), 1, make_weights())


def fill_and_wait(ready):
    """Leaves a file in a locked folder and waits to be killed."""
    transport = SharedMemoryTransport(0, 1.0)
    (transport._folder / "bucket").write_bytes(b"x" * 100)
    ready.send(str(transport._folder))
    signal.pause()


def test_what_a_killed_sender_left_is_removed_by_the_next_one_and_nothing_else():
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=fill_and_wait, args=(theirs,))
    process.start()
    folder = Path(ours.recv())
    living = SharedMemoryTransport(0, 1.0)
    remove_abandoned()
    assert folder.exists() and (folder / "bucket").exists()
    process.kill()
    process.join()
    another = SharedMemoryTransport(1, 1.0)
    assert not folder.exists() and living._folder.exists() and another._folder.exists()


def serve_gloo(connection):
    """An engine in a process of its own: executes what comes through the pipe."""
    torch.set_num_threads(1)
    engine = LocalEngine()
    while True:
        method, args = connection.recv()
        try:
            result = getattr(engine, method).remote(*args).future().result()
        except SyncError as error:
            result = error
        if method == "commit_weight_update":
            result = {name: tensor.float().numpy() for name, tensor in engine.installer.tensors.items()}
        connection.send(result)


class ProcessEngine:
    """Handle of serve_gloo."""

    def __init__(self):
        from concurrent.futures import ThreadPoolExecutor

        from sync_cases import Method

        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=serve_gloo, args=(other,), daemon=True)
        self.process.start()
        other.close()
        pool = ThreadPoolExecutor(max_workers=1)
        for method in ("begin_weight_update", "receive_bucket", "commit_weight_update"):
            setattr(self, method, Method(pool, lambda *args, method=method: self._call(method, *args)))

    def _call(self, method, *args):
        self.connection.send((method, args))
        result = self.connection.recv()
        if isinstance(result, Exception):
            raise result
        return result


def test_gloo_reaches_two_other_processes_and_the_death_of_one_spares_the_other():
    engines, weights = [ProcessEngine(), ProcessEngine()], make_weights()
    sender = make_sender(transport="gloo", bucket_bytes=7000, timeout_s=30.0)
    try:
        for engine in engines:
            engine.begin_weight_update.remote(1).future().result()
        report = sender.send(1, iter(weights.items()), engines)
        assert not report.failed
        for engine in engines:
            held = engine.commit_weight_update.remote(1, report.records).future().result()
            assert all(torch.from_numpy(held[name]).equal(tensor.float()) for name, tensor in encoded(weights).items())
        for engine in engines:
            engine.begin_weight_update.remote(2).future().result()
        engines[0].process.kill()
        moved = nudge(weights, seed=1)
        report = sender.send(2, iter(moved.items()), engines)
        assert list(report.failed) == [0]
        held = engines[1].commit_weight_update.remote(2, report.records).future().result()
        assert torch.from_numpy(held[f"{LINEARS[0]}.weight"]).equal(encoded(moved)[f"{LINEARS[0]}.weight"].float())
    finally:
        for engine in engines:
            engine.process.kill()
            engine.process.join()


def test_auto_names_a_transport_of_the_table_for_every_place():
    assert choose_transport("auto", device="cpu", colocate=False) == "object_store"
    assert choose_transport("auto", device="cuda", colocate=False) == "nccl"
    assert choose_transport("auto", device="cuda", colocate=True) == "cuda_ipc"
    assert choose_transport("gloo", device="cuda", colocate=True) == "gloo"
    assert set(TRANSPORTS) == {"object_store", "shared_memory", "gloo", "nccl", "cuda_ipc"}


def test_a_header_without_payload_is_refused():
    with pytest.raises(AssertionError, match="has no payload"):
        update(make_sender(), LocalEngine(tamper=lambda bucket: replace(bucket, payload=None)), 1, make_weights())
