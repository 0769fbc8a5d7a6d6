"""qurl.sync.bucket and qurl.sync.delta."""

import pickle
from dataclasses import replace

import pytest
import torch

from qurl.sync import SyncError
from qurl.sync.bucket import ALIGNMENT, Delta, WireTensor, describe, lay_out, pack, unpack
from qurl.sync.delta import apply_changes, find_changes, is_smaller_as_delta, num_changes


def mixed_tensors():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 13, generator=generator)
    return {
        "codes": (weight * 20).to(torch.int8), "fp8": weight.to(torch.float8_e4m3fn), "scale": weight[:, :1].clone(),
        "norm": weight[0].to(torch.bfloat16), "transposed": weight.T, "scalar": torch.tensor(3.0), "empty": torch.empty(0, 4),
    }  # fmt: skip


def laid_out(tensors):
    wire = [WireTensor(record=describe(name, tensor), pieces=(tensor,), delta=None) for name, tensor in tensors.items()]
    bucket, pieces = lay_out(wire, version=3, sender_rank=1, index=2, keep_base=False)
    buffer = torch.full((bucket.num_bytes,), 0xA5, dtype=torch.uint8)
    pack(pieces, buffer)
    return bucket, buffer


def test_mixed_dtypes_come_back_as_aligned_views_of_the_buffer():
    tensors = mixed_tensors()
    bucket, buffer = laid_out(tensors)
    bucket = pickle.loads(pickle.dumps(bucket))
    storage = buffer.untyped_storage().data_ptr()
    found = {entry.record.name: pieces[0] for entry, pieces in unpack(bucket, buffer)}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        view = found[name]
        assert (view.dtype, view.shape) == (tensor.dtype, tensor.shape)
        assert view.float().equal(tensor.float())
        assert view.untyped_storage().data_ptr() == storage and view.storage_offset() * view.element_size() % ALIGNMENT == 0


@pytest.mark.parametrize("cut", [1, ALIGNMENT, 10 * ALIGNMENT])
def test_a_truncated_buffer_is_refused(cut):
    bucket, buffer = laid_out(mixed_tensors())
    with pytest.raises(SyncError, match="arrived"):
        list(unpack(bucket, buffer[:-cut]))
    with pytest.raises(SyncError, match="truncated or damaged"):
        list(unpack(replace(bucket, num_bytes=bucket.num_bytes - cut), buffer[:-cut]))


@pytest.mark.parametrize(
    "change", [{"dtype": "int9"}, {"dtype": "nn"}, {"dtype": "float32"}, {"shape": (7, 14)}, {"num_bytes": 90}]
)
def test_a_header_that_contradicts_itself_is_refused(change):
    bucket, buffer = laid_out({"codes": mixed_tensors()["codes"]})
    entry = bucket.entries[0]
    damaged = replace(bucket, entries=(replace(entry, record=replace(entry.record, **change)),))
    with pytest.raises(SyncError, match="codes"):
        list(unpack(damaged, buffer))


@pytest.mark.parametrize("offset", [-64, 7, 1 << 40])
def test_an_offset_outside_of_the_buffer_is_refused(offset):
    bucket, buffer = laid_out({"codes": mixed_tensors()["codes"]})
    with pytest.raises(SyncError, match="codes"):
        list(unpack(replace(bucket, entries=(replace(bucket.entries[0], offset=offset),)), buffer))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fraction", [0.0, 0.03, 1.0])
def test_changes_applied_to_the_old_tensor_make_the_new_one(dtype, fraction):
    generator = torch.Generator().manual_seed(1)
    old = (torch.randn(40, 30, generator=generator) * 50).to(dtype)
    moved = torch.rand(40, 30, generator=generator) < fraction
    new = torch.where(moved, -old.float() - 1, old.float()).to(dtype)
    positions, values = find_changes(old, new)
    slow = [i for i in range(old.numel()) if bytes(old.view(-1)[i : i + 1].view(torch.uint8).tolist()) !=
            bytes(new.view(-1)[i : i + 1].view(torch.uint8).tolist())]  # fmt: skip
    assert positions.tolist() == slow and len(slow) == num_changes(old, new)
    wire = WireTensor(record=describe("w", new), pieces=(positions, values), delta=Delta(base_version=1, num_changes=len(slow)))
    bucket, pieces = lay_out([wire], version=2, sender_rank=0, index=0, keep_base=True)
    buffer = torch.zeros(bucket.num_bytes, dtype=torch.uint8)
    pack(pieces, buffer)
    [(_, received)] = unpack(bucket, buffer)
    apply_changes(old, *received)
    assert describe("w", old) == describe("w", new)


def test_changes_are_counted_in_bits_so_nan_equals_itself_and_the_sign_of_zero_counts():
    old = torch.tensor([float("nan"), 0.0, 1.0])
    assert num_changes(old, old.clone()) == 0
    assert num_changes(old, torch.tensor([float("nan"), -0.0, 1.0])) == 1


@pytest.mark.parametrize(("dtype", "most"), [(torch.int8, 19), (torch.bfloat16, 33), (torch.float32, 49)])
def test_a_delta_is_chosen_only_where_it_takes_fewer_bytes(dtype, most):
    """100 elements: k changes take k * (4 + size) bytes against 100 * size."""
    tensor = torch.zeros(100, dtype=dtype)
    assert is_smaller_as_delta(tensor, most) and not is_smaller_as_delta(tensor, most + 1)
