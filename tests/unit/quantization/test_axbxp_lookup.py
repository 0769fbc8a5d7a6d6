"""Compiled lookups of Ax-BxP against those in torch, which other tests compare with loops over single blocks."""

import logging

import pytest
import torch

from qurl.quantization.axbxp import Digits, all_precisions, parse
from qurl.quantization.axbxp import blocks as axbxp_blocks
from qurl.quantization.axbxp.blocks import _look_up_in_torch, activation_table, keep, lower_parts, lower_table, weight_table
from qurl.quantization.axbxp.precision import GROUPS
from qurl.quantization.kernels.cpu import library
from qurl.quantization.kernels.cpu.library import PATHS, KernelsUnavailable, Library
from qurl.quantization.kernels.cpu.lookup import LookupKernel, lookup_kernel

try:
    LOADED = library.load()
except KernelsUnavailable as error:
    pytest.skip(f"no compiled kernels: {error}", allow_module_level=True)

KERNELS = {path: LookupKernel(Library(LOADED.functions, path)) for path in PATHS[: LOADED.functions.qurl_num_paths()]}
SHAPES = [(6, 256), (3, 37), (2, 300), (5, 1)]


def any_codes(*shape, seed=0):
    """All bytes, small codes as often as large ones."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
    return codes >> torch.randint(0, 8, shape, dtype=torch.int8, generator=generator)


def every_code():
    """Each of 256 in groups of its own and beside others."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.int8)
    alone = torch.zeros(256, 17, dtype=torch.int8)
    alone[:, 5] = codes
    return [codes[None], alone]


def assert_equals_torch(kernel, codes, values, lowest, group):
    assert torch.equal(kernel.look_up(codes, values, lowest, group), _look_up_in_torch(codes, values, lowest, group))


@pytest.mark.parametrize("path", KERNELS)
@pytest.mark.parametrize("digits", list(Digits))
def test_every_table_gives_every_code_what_torch_gives(path, digits):
    bits = (2, 3, 4) if digits is Digits.balanced else (1, 2, 3, 4)
    settings = all_precisions(bits, weight_groups=(None, *GROUPS), activation_groups=(None,), digits=digits)
    tables = {id(table): table for table in (lower_table(digits), *map(weight_table, settings))}.values()
    assert len(tables) > 50 and {table.group for table in tables} == set(GROUPS)
    inputs = [*every_code(), *(any_codes(*shape) for shape in SHAPES)]
    for table in tables:
        for codes in inputs:
            assert_equals_torch(KERNELS[path], codes, table.values, table.lowest, table.group)


@pytest.mark.parametrize("path", KERNELS)
@pytest.mark.parametrize("group", GROUPS)
def test_a_table_need_not_be_odd(path, group):
    generator = torch.Generator().manual_seed(group)
    odd = torch.randint(-127, 128, (5, 256), dtype=torch.int8, generator=generator)
    odd[:, 0], odd[:, 128] = 0, odd[:, 129]
    odd[:, 129:] = -odd[:, 1:128].flip(1)
    odd[:, 128] = odd[:, 129]
    even = torch.randint(0, 5, (256,), dtype=torch.int8, generator=generator).sort().values
    even[0], even[1:128] = 0, even[128:255].clone()
    even[129:] = even[1:128].flip(0)
    even[128] = even[129]
    assert_equals_torch(KERNELS[path], any_codes(3, 257), odd, even, group)
    for place in (0, 1, 77, 127, 128, 129, 255):
        values, lowest = odd.clone(), even.clone()
        values[:, place] += 1
        assert_equals_torch(KERNELS[path], every_code()[0].repeat(1, 2), values, even, group)
        lowest[place] = 4 if place else 0
        assert_equals_torch(KERNELS[path], every_code()[0].repeat(1, 2), odd, lowest, group)


@pytest.mark.parametrize("path", KERNELS)
@pytest.mark.parametrize("shape", [(1, 200001), (4099, 51), (3, 65536)])
def test_results_do_not_depend_on_threads(path, shape):
    codes, threads = any_codes(*shape), torch.get_num_threads()
    try:
        for setting in ("k4-w1-a2", "k2-w2g4-a2", "k2-w2g16-a2", "k2-w2g128-a2"):
            table = weight_table(parse(setting))
            expected = _look_up_in_torch(codes, table.values, table.lowest, table.group)
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert torch.equal(KERNELS[path].look_up(codes, table.values, table.lowest, table.group), expected)
    finally:
        torch.set_num_threads(threads)


def test_any_shape_and_layout_is_taken_and_the_codes_stay():
    table = weight_table(parse("k2-w2g16-a3g1"))
    codes = any_codes(48, 40)
    before = codes.clone()
    for given in (codes.T, codes[:, 3:30], codes[::2, 1:], codes.view(2, 24, 40), codes[0], codes[:0], codes[:, :0]):
        found = keep(given, table)
        expected = _look_up_in_torch(given, table.values, table.lowest, table.group) if given.numel() else given
        assert torch.equal(found, expected) and found.is_contiguous()
    assert torch.equal(codes, before)


def test_without_the_library_torch_looks_up_and_says_so_once(monkeypatch, caplog):
    tables = [table(parse(s)) for s in ("k2-w2g16-a3g1", "k3-w1-a1-balanced") for table in (weight_table, activation_table)]
    codes = any_codes(7, 300)
    expected = [keep(codes, table) for table in tables] + [lower_parts(codes, digits) for digits in Digits]
    lookup_kernel.cache_clear()
    try:
        monkeypatch.setenv("QURL_CPU_KERNELS", "off")
        monkeypatch.setattr("qurl.quantization.kernels.cpu.lookup.load", library._load)
        monkeypatch.setattr(axbxp_blocks, "CHUNK", 600)
        with caplog.at_level(logging.WARNING):
            found = [keep(codes, table) for table in tables] + [lower_parts(codes, digits) for digits in Digits]
        assert [record.message for record in caplog.records] == [
            "codes are looked up in torch, which is slower (QURL_CPU_KERNELS=off)"
        ]
    finally:
        lookup_kernel.cache_clear()
    assert all(map(torch.equal, found, expected))


def test_a_compiler_that_traces_sees_operators_that_it_knows(monkeypatch):
    codes, table = any_codes(4, 64), activation_table(parse("k2-w2g16-a3g1"))
    expected = keep(codes, table)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(axbxp_blocks, "lookup_kernel", lambda: pytest.fail("an unknown function was called"))
    assert torch.equal(keep(codes, table), expected) and lower_parts(codes, Digits.rounded).shape == codes.shape
