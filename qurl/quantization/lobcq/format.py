"""LO-BCQ as a format: arrays with E4M3 scales, blocks with a codebook each.

The paper multiplies by s_A = largest / max|array| and stores E4M3(s_A / s_X), where s_X is that of the whole tensor. We store the
inverse: the E4M3 number nearest to max|array| / largest * g, where g = 448 * largest / max|tensor|, and a number is
codeword * scale / g. Both cost one rounding to E4M3, with errors that are alike. g is one float32 for a weight and one for each
token of the activations: the paper's single one for all activations would make a token's result depend on its neighbors.

Rounding the scale down leaves numbers up to a sixteenth beyond the largest codeword, which they then get. An array of zeros has
scale 0, since a codebook need not contain 0."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from functools import cache, cached_property

import torch
from torch import Tensor
from torch.nn import functional

from qurl.quantization.grouped import GroupedFormat
from qurl.quantization.lobcq.codebook_sets import CodebookSets, LayerCodebooks
from qurl.quantization.lobcq.codebooks import FOLDER, Codebooks, load_codebooks
from qurl.quantization.lobcq.layout import NUM_ENTRIES, Layout
from qurl.quantization.packing import pack, pack_bits, unpack, unpack_bits
from qurl.quantization.two_level import e4m3_scales, global_scale_of


class LoBcq(GroupedFormat):
    """weight uint8 [O, I/2], two codes a byte; weight_selector uint8 [O, ceil(I/L_b log2(N_c) / 8)], the book of each block (absent
    where there is one book); weight_scale float8_e4m3fn [O, I/L_A]; weight_global_scale float32 [1]."""

    matrix_tensors = frozenset({"weight_global_scale"})
    shorter_blocks = "give quantization.codebooks with shorter arrays (L_A), "

    def __init__(
        self, name: str, layout: Layout, codebooks: str | Codebooks | CodebookSets, keeps_activations: bool = False
    ) -> None:
        """codebooks: those of this package with that SHA-256, which are read when they are needed, or others, universal or not.

        keeps_activations: W4A16; else W4A4."""
        self.name = name
        self.layout = layout
        self.block = (1, layout.array)
        self.keeps_activations = keeps_activations
        self._given = CodebookSets.universal(codebooks) if isinstance(codebooks, Codebooks) else codebooks

    @cached_property
    def sets(self) -> CodebookSets:
        """Of all layers. Raises ValueError where the package's file is damaged or another."""
        if isinstance(self._given, CodebookSets):
            return self._given
        return CodebookSets.universal(load_codebooks(FOLDER / self.layout.file_name, self._given))

    @cached_property
    def codebooks(self) -> LayerCodebooks:
        """Of a layer. A format whose layers have different ones has them after of_layer alone."""
        (_, codebooks), *others = self.sets.layers
        assert not others, "of_layer chooses the codebooks"
        return codebooks

    @property
    def own_codebooks(self) -> CodebookSets | None:
        """Where they are not the package's."""
        return self._given if isinstance(self._given, CodebookSets) else None

    @property
    def codebooks_sha256(self) -> str:
        """Of layouts and entries, and of which layer has which."""
        return self.sets.sha256

    def of_layer(self, name: str) -> LoBcq:
        """The format with the codebooks of one layer alone. Raises ValueError where the layer has none."""
        return self.of_layers([name])

    def of_layers(self, names: Sequence[str]) -> LoBcq:
        """The same object for all that have the same codebooks. Raises ValueError where these have not, or one has none."""
        codebooks = self.sets.of_layers(names)
        return _with_codebooks(self, codebooks) if len(self.sets.layers) > 1 else self

    def check_layers(self, layers: Collection[str]) -> None:
        """Raises ValueError where codebooks are for layers that the model has not, and where some layers have none or, together,
        different ones."""
        self.sets.check_layers(layers)
        super().check_layers(layers)

    def shared_bits(self, layers: Collection[str]) -> int:
        """Of the layers' sets for weights. The package's, which all models share, count nothing, as in the paper."""
        if self.own_codebooks is None:
            return 0
        return len({self.sets.of_layer(name).weights for name in layers}) * self.layout.set_bits

    def wire_row(self, columns: int) -> dict[str, Tensor]:
        """That of any layer."""
        return _with_codebooks(self, self.sets.layers[0][1]).encode(torch.ones(1, columns))

    @property
    def part(self) -> tuple[int, int]:
        """Selectors fill whole bytes."""
        return 1, math.lcm(self.column_multiple, self.layout.block * (8 // math.gcd(8, self.layout.selector_bits)))

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Codes, books and scales; ValueError for NaN, Inf or a number of inputs that is no multiple of L_A."""
        groups = self.weight_groups(weight)
        amax = groups.abs().amax(dim=-1)
        global_scale = global_scale_of(amax.amax().view(1), self.layout.largest)
        scale = e4m3_scales(amax, global_scale, self.layout.largest, 0.0)
        books, codes = _search(self.codebooks.weights, groups, scale, global_scale)
        wire = {"weight": pack(codes.view(len(groups), -1))}
        if self.layout.selector_bits:
            wire["weight_selector"] = pack_bits(books.view(len(groups), -1), self.layout.selector_bits)
        return {**wire, "weight_scale": scale, "weight_global_scale": global_scale}

    def decode(self, wire: Mapping[str, Tensor]) -> Tensor:
        """[O, I] float32."""
        codes = unpack(wire["weight"])
        blocks = codes.shape[1] // self.layout.block
        if self.layout.selector_bits:
            books = unpack_bits(wire["weight_selector"], self.layout.selector_bits, blocks)
        else:
            books = codes.new_zeros((len(codes), blocks))
        codewords = _entries(self.codebooks.weights, books.flatten(), codes.view(-1, self.layout.block)).view(codes.shape)
        return self.ungrouped(self.grouped(codewords) * (wire["weight_scale"].float() / wire["weight_global_scale"])[..., None])

    def quantize_activations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codewords [..., I] and scales [..., I/L_A], the E4M3 one over the token's, both as float32.

        NaN or Inf in a token makes its scales, and what is computed from them, non-finite."""
        if self.keeps_activations:
            return super().quantize_activations(x)
        codebooks = self.codebooks.activations
        groups = self.activation_groups(x)
        amax = groups.abs().amax(dim=-1)
        global_scale = global_scale_of(amax.amax(dim=-1, keepdim=True), codebooks.layout.largest)
        scale = e4m3_scales(amax, global_scale, codebooks.layout.largest, 0.0)
        found = _search(codebooks, groups, scale, global_scale)
        return _entries(codebooks, *found).view(x.shape), scale.float() / global_scale

    def bits_per_weight(self, shape: Sequence[int]) -> float:
        """4, log2(N_c) per block, where rows are whole bytes, a byte per array and a float32."""
        selector_bytes = -(-shape[1] // self.layout.block * self.layout.selector_bits // 8)
        return 4.0 + 8.0 * selector_bytes / shape[1] + 8.0 / self.layout.array + 32.0 / (shape[0] * shape[1])


@cache
def _with_codebooks(format: LoBcq, codebooks: LayerCodebooks) -> LoBcq:
    """The format with these in all layers."""
    found = copy.copy(format)
    found.__dict__.pop("sets", None)
    found.__dict__.pop("codebooks", None)
    found._given = CodebookSets.of_every_layer(codebooks)
    return found


def _search(codebooks: Codebooks, groups: Tensor, scale: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Books [n] and codes [n, L_b] of all blocks of [..., groups, L_A]."""
    inverse = (global_scale / scale.float()).where(scale.float() > 0, 0.0)
    return codebooks.nearest((groups * inverse[..., None]).reshape(-1, codebooks.layout.block))


def _entries(codebooks: Codebooks, books: Tensor, codes: Tensor) -> Tensor:
    """Codewords float32 [n, L_b]."""
    table = codebooks.table.to(codes.device)
    return functional.embedding(books[:, None].int() * NUM_ENTRIES + codes, table[:, None])[..., 0]
