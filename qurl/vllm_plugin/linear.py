"""The linear method of every format, none included: load, encode, run, and be loaded again.

A layer is either staged or live. Staged, it has the parameters of a checkpoint, which the model's own loaders know how to fill
(names, fused q/k/v rows, tensor-parallel shards). Live, it has what its kernel needs and the staged tensors are gone. vLLM starts
with a staged layer; an update stages it again with the tensors of the wire.

    create_weights -> [full precision, or codes of an encoded checkpoint] -> process_weights_after_loading -> live
    stage          -> [codes and scales from the stream]                  -> process_weights_after_loading -> live

On a GPU a captured CUDA graph reads the storage of the first live parameters, so later ones are copied into it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import UnquantizedLinearMethod, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import ChannelQuantScaleParameter, ModelWeightParameter

from qurl.quantization.base import QuantizationFormat
from qurl.quantization.packing import is_packed, pack, unpack
from qurl.vllm_plugin.compat import full_output_sizes, keep_shard, shard_index
from qurl.vllm_plugin.kernels import LayerShape, LinearKernel, as_parameter, row_block, scale_per_row, select_kernel

if TYPE_CHECKING:
    from qurl.vllm_plugin.config import QurlConfig

NOT_LOADED = 0xFF
"""A byte that fills scales which did not come yet: NaN in float32, E4M3 and E8M0."""


@register_weight_loader_v2_supported_method
class QurlLinearMethod(UnquantizedLinearMethod):
    """One linear layer. `format` is None until the first weights have been loaded, then fixed."""

    supports_pre_processed_weights = False

    def __init__(self, config: QurlConfig, names: list[str]) -> None:
        super().__init__()
        self.config = config
        self.names = names  # Hugging Face modules, in the order of their rows
        self.format: QuantizationFormat | None = None
        self.kernel: LinearKernel | None = None
        self._graph_storage: dict[str, Tensor] = {}  # of live parameters on a GPU

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Stage the layer for the start-up checkpoint."""
        sizes = full_output_sizes(layer)
        self.full_sizes = sizes if len(sizes) == len(self.names) else [sum(sizes)]  # rows of each Hugging Face matrix
        self.loader = extra_weight_attrs["weight_loader"]
        is_fused_here = len(self.names) == len(output_partition_sizes)  # else the checkpoint has it fused already
        self.shape = LayerShape(
            partitions=tuple(output_partition_sizes) if is_fused_here else (sum(output_partition_sizes),),
            columns=input_size_per_partition,
            dtype=params_dtype,
            device=torch.get_default_device(),
        )
        self.full_columns = input_size
        self._check_sharding(sum(output_partition_sizes) != output_size)
        layer.logical_widths = output_partition_sizes  # vLLM's kernels read it
        self._stage_matrix(layer, "weight", params_dtype, self.shape.columns)
        if self.config.encoded:  # codes, unpacked, are exact in every floating dtype
            scale = self._wire_row(self.shape.columns)["weight_scale"]
            self._stage_matrix(layer, "weight_scale", scale.dtype, scale.shape[1])
            layer.weight_scale.data.view(torch.uint8).fill_(NOT_LOADED)

    def stage(self, layer: Any) -> None:
        """Prepare a live layer for the wire tensors of its format (or the weight, for none)."""
        assert self.format is not None
        if self.format.name == "none":
            self._stage_matrix(layer, "weight", self.shape.dtype, self.shape.columns)
        else:
            for name, row in self._wire_row(self.shape.columns).items():
                self._stage_matrix(layer, name, row.dtype, row.shape[1])
        layer.update_param_tp_status()

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make a staged layer live. Raises ValueError for patterns that cannot be honoured or weights that cannot be encoded."""
        is_first = self.format is None
        if self.format is None:
            self.format = self.config.format_of(self.names)
        if self.format.name == "none":
            super().process_weights_after_loading(layer)
        else:
            self.kernel = self.kernel or select_kernel(self.format, layer, self.shape)
            codes, scale = self._startup_codes(layer) if is_first else (layer.weight.data, layer.weight_scale.data)
            for name in ("weight", "weight_scale"):
                layer.register_parameter(name, None)
            self.kernel.load(layer, codes, scale)
        if self.shape.device.type != "cpu":
            self._keep_storage(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.kernel is None:
            return super().apply(layer, x, bias)
        return self.kernel.apply(layer, x, bias)

    def read_back(self, layer: Any) -> list[Tensor]:
        """What the engine multiplies with, decoded: one float32 matrix (this rank's part) per Hugging Face module."""
        if self.format is None or self.kernel is None:
            identity = torch.eye(self.shape.columns, dtype=self.shape.dtype, device=self.shape.device)
            return list(self.apply(layer, identity).float().T.split(self.shape.partitions))
        return self.kernel.decoded(layer, self.format, self.shape.partitions)

    def wire_dtype(self, name: str) -> torch.dtype:
        """Of the tensor "weight" or "weight_scale" on the wire."""
        return self._wire_row(1)[name].dtype

    def wire_rows(self) -> dict[str, int]:
        """Rows that an update brings for each parameter of the weight, over all ranks and fused matrices."""
        assert self.format is not None
        rows = {"weight": sum(self.full_sizes)}
        if self.format.name != "none":
            block = row_block(self.format.name)
            rows["weight_scale"] = sum(-(-size // block) for size in self.full_sizes)
        return rows

    def _wire_row(self, columns: int) -> dict[str, Tensor]:
        """Wire tensors of a weight of one row and so many columns, or the next more that the format can encode."""
        rounded = -(-columns // self._column_block) * self._column_block
        return self.config.format.encode(torch.zeros(1, rounded))

    @property
    def _column_block(self) -> int:
        return self.config.format.block[1] if self.config.format.has_whole_blocks else 1

    def _check_sharding(self, is_column_sharded: bool) -> None:
        """Blocks of scales must not straddle tensor-parallel ranks."""
        rows, columns = self.config.format.block
        is_cut = is_column_sharded and any(part % rows for part in self.shape.partitions)
        if is_cut or (self.full_columns != self.shape.columns and self.shape.columns % columns):
            sizes = f"{list(self.shape.partitions)} x {self.shape.columns}"
            raise ValueError(
                f"rollout.tensor_parallel_size cuts {', '.join(self.names)} into {sizes}, which is no multiple of "
                f"{rows} x {columns} as {self.config.format.name} needs; use fewer ranks or quantization.format=fp8"
            )

    def _stage_matrix(self, layer: Any, name: str, dtype: torch.dtype, columns: int) -> None:
        """Register an empty [O, columns] parameter that the model's loaders can fill."""
        data = torch.empty((self.shape.rows, columns), dtype=dtype, device=self.shape.device)
        loader = self._load_scale if name == "weight_scale" else self._load_codes
        arguments: dict[str, Any] = {"data": data, "output_dim": 0, "weight_loader": loader}
        parameter: nn.Parameter
        if name == "weight_scale" and self._wire_row(self.full_columns)[name].shape[1] == 1:
            parameter = ChannelQuantScaleParameter(**arguments)  # not divided over ranks with the columns
        else:
            parameter = ModelWeightParameter(input_dim=1, **arguments)
        layer.register_parameter(name, parameter)

    def _load_codes(self, parameter: nn.Parameter, tensor: Tensor, *arguments: Any) -> None:
        """Weight loader for the weight: packed codes of an encoded checkpoint go where an ignored layer's numbers would, one a
        place, since the checkpoint is loaded before it is known which layers are ignored."""
        if is_packed(tensor) and parameter.is_floating_point():
            tensor = keep_shard(unpack(tensor), tensor)
        self.loader(parameter, tensor, *arguments)

    def _load_scale(self, parameter: nn.Parameter, tensor: Tensor, *arguments: Any) -> None:
        """Weight loader for wire scales: one row of scales per row of the matrix, so that they shard and fuse like the codes."""
        shard = shard_index(tensor, arguments)
        rows = sum(self.full_sizes) if shard is None else self.full_sizes[shard]
        self.loader(parameter, keep_shard(scale_per_row(self.config.format.name, tensor, rows), tensor), *arguments)

    def _startup_codes(self, layer: Any) -> tuple[Tensor, Tensor]:
        """Codes [O, I] and scales per row [O, groups] from the staged checkpoint."""
        weight = layer.weight.data
        if self.config.encoded:
            scale = layer.weight_scale.data
            if (scale.view(torch.uint8) == NOT_LOADED).view(*scale.shape, -1).all(dim=-1).any():
                raise ValueError(f"the checkpoint has no weight_scale for all of {', '.join(self.names)}; it is not an encoded one")
            codes = weight.to(self.wire_dtype("weight"))
            return pack(codes) if is_packed(codes) else codes, scale
        wires = [self._encode(part) for part in weight.split(self.shape.partitions)]
        return torch.cat([codes for codes, _ in wires]), torch.cat([scale for _, scale in wires])

    def _encode(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """One Hugging Face matrix (this rank's part), with the scales of the whole matrix."""
        if self.full_columns == self.shape.columns:
            wire = self.config.format.encode(matrix)
            return wire["weight"], scale_per_row(self.config.format.name, wire["weight_scale"], len(matrix))
        wire = self.config.format.encode(tensor_model_parallel_all_gather(matrix.contiguous(), dim=1))
        scale = scale_per_row(self.config.format.name, wire["weight_scale"], len(matrix))
        own = {name: row.shape[1] for name, row in self._wire_row(self.shape.columns).items()}
        return _own_columns(wire["weight"], own["weight"]), _own_columns(scale, own["weight_scale"])

    def _keep_storage(self, layer: Any) -> None:
        """Move the live parameters into the storage of the first ones."""
        for name, parameter in list(layer.named_parameters(recurse=False)):
            if name == "bias":  # loaded in place, always
                continue
            if name not in self._graph_storage:
                self._graph_storage[name] = parameter.data
                continue
            self._graph_storage[name].copy_(parameter.data)
            layer.register_parameter(name, as_parameter(self._graph_storage[name]))


def _own_columns(tensor: Tensor, columns: int) -> Tensor:
    """This rank's columns of a tensor that is divided over ranks with the inputs; a scale of whole rows is not."""
    if tensor.shape[1] == columns:
        return tensor
    return tensor[:, get_tensor_model_parallel_rank() * columns :][:, :columns].contiguous()
