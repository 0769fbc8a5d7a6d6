"""The weight stream from learner to engines."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class SyncConfig:
    """Transport and checks."""

    transport: str = "auto"  # auto or a key of qurl.sync.TRANSPORTS: object_store, shared_memory, gloo, nccl, cuda_ipc
    bucket_bytes: int = 256 << 20
    max_inflight_buckets: int = 2
    timeout_s: float = 300.0  # an engine that does not answer one step of an update for so long is replaced
    max_retries: int = 2  # per engine and update; then the engine is replaced
    track_changes: bool = True  # report sync/changed_code_fraction; keeps previous codes where the learner encodes
    track_changes_interval: int = 0  # compares one matrix in so many, others in the next update; 0: 1 on CPUs, 11 on GPUs
    track_updates: bool = False  # report quantization/update_to_noise*; keeps the previous weights in learner host memory, float32
    delta: bool = False  # ship only changed codes where that is smaller; needs track_changes
    audit_layers: int = 0  # weight matrices decoded from the engine and compared after every update
