"""The linear method of every format, none included: load, encode, run, and be loaded again.

A layer is either staged or live. Staged, it has the parameters of a checkpoint, which the model's own loaders know how to fill
(names, fused q/k/v rows, tensor-parallel shards). Live, it has what its kernel needs and the staged tensors are gone. vLLM starts
with a staged layer; an update stages it again with the tensors of the wire.

    create_weights -> [full precision, or codes of an encoded checkpoint] -> process_weights_after_loading -> live
    stage          -> [codes and scales from the stream]                  -> process_weights_after_loading -> live

On a GPU a captured CUDA graph reads the storage of the first live parameters, so later ones are copied into it."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import UnquantizedLinearMethod, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import ChannelQuantScaleParameter, ModelWeightParameter

from qurl.quantization.base import QuantizationFormat
from qurl.quantization.packing import is_packed, pack, unpack
from qurl.vllm_plugin.compat import full_output_sizes, keep_shard, shard_index
from qurl.vllm_plugin.kernels import LayerShape, LinearKernel, as_parameter, num_wire_rows, rows_of, select_kernel

if TYPE_CHECKING:
    from qurl.vllm_plugin.config import QurlConfig

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
        self._loaded_rows: Counter[str] = Counter()  # that came so far for each wire tensor but the codes
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
            self._stage_wire(layer, skip="weight")

    def stage(self, layer: Any) -> None:
        """Prepare a live layer for the wire tensors of its format (or the weight, for none)."""
        assert self.format is not None
        if self.format.name == "none":
            self._stage_matrix(layer, "weight", self.shape.dtype, self.shape.columns)
        else:
            self._stage_wire(layer)
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
            names = list(self._wire_row(1))
            rows = self._startup_rows(layer) if is_first else {name: layer.get_parameter(name).data for name in names}
            for name in names:
                layer.register_parameter(name, None)
            self.kernel.load(layer, rows)
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
        """Of the tensor `name` on the wire."""
        return self._wire_row(1)[name].dtype

    def wire_rows(self) -> dict[str, int]:
        """Rows that an update brings for each parameter of the weight, over all ranks and fused matrices."""
        assert self.format is not None
        names = ["weight"] if self.format.name == "none" else list(self._wire_row(1))
        return {name: sum(num_wire_rows(self.format, name, size) for size in self.full_sizes) for name in names}

    def _wire_row(self, columns: int) -> dict[str, Tensor]:
        """Wire tensors of a weight of one row and so many columns, or the next more that the format can encode, one row each."""
        multiple = self.config.format.column_multiple
        rounded = -(-columns // multiple) * multiple
        wire = self.config.format.wire_row(rounded)
        return {name: rows_of(self.config.format, name, tensor, 1) for name, tensor in wire.items()}

    def _check_sharding(self, is_column_sharded: bool) -> None:
        """Blocks of scales or of a rotation must not straddle tensor-parallel ranks, nor must a whole matrix that has one."""
        if self.config.format.matrix_tensors and (is_column_sharded or self.full_columns != self.shape.columns):
            raise ValueError(
                f"rollout.tensor_parallel_size must be 1 with quantization.format={self.config.format.name}, which has a scale for "
                "the whole of a weight; use quantization.format=mxfp4"
            )
        rows, columns = self.config.format.block
        columns = max(columns, self.config.format.column_multiple)
        is_cut = is_column_sharded and any(part % rows for part in self.shape.partitions)
        if is_cut or (self.full_columns != self.shape.columns and self.shape.columns % columns):
            sizes = f"{list(self.shape.partitions)} x {self.shape.columns}"
            raise ValueError(
                f"rollout.tensor_parallel_size cuts {', '.join(self.names)} into {sizes}, which is no multiple of "
                f"{rows} x {columns} as {self.config.format.name} needs; use fewer ranks or quantization.format=fp8"
            )

    def _stage_wire(self, layer: Any, skip: str = "") -> None:
        """Register empty parameters for the wire tensors but `skip`."""
        for name, row in self._wire_row(self.shape.columns).items():
            if name != skip:
                self._stage_matrix(layer, name, row.dtype, row.shape[1])

    def _stage_matrix(self, layer: Any, name: str, dtype: torch.dtype, columns: int) -> None:
        """Register an empty [O, columns] parameter that the model's loaders can fill."""
        data = torch.empty((self.shape.rows, columns), dtype=dtype, device=self.shape.device)
        loader = self._load_codes if name == "weight" else partial(self._load_scale, name)
        arguments: dict[str, Any] = {"data": data, "output_dim": 0, "weight_loader": loader}
        parameter: nn.Parameter
        if name != "weight" and self._wire_row(self.full_columns)[name].shape[1] == 1:
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

    def _load_scale(self, name: str, parameter: nn.Parameter, tensor: Tensor, *arguments: Any) -> None:
        """Weight loader for the wire tensor `name`, which is not "weight"."""
        shard = shard_index(tensor, arguments)
        rows = sum(self.full_sizes) if shard is None else self.full_sizes[shard]
        self._loaded_rows[name] += rows
        self.loader(parameter, keep_shard(rows_of(self.config.format, name, tensor, rows), tensor), *arguments)

    def _startup_rows(self, layer: Any) -> dict[str, Tensor]:
        """The kernel's rows from the staged checkpoint."""
        weight = layer.weight.data
        if self.config.encoded:
            codes = weight.to(self.wire_dtype("weight"))
            scales = {name: layer.get_parameter(name).data for name in self._wire_row(1) if name != "weight"}
            for name in (name for name in scales if self._loaded_rows[name] < sum(self.full_sizes)):
                raise ValueError(f"the checkpoint has no {name} for all of {', '.join(self.names)}; it is not an encoded one")
            return {"weight": pack(codes) if is_packed(codes) else codes, **scales}
        parts = [self._encode(part) for part in weight.split(self.shape.partitions)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _encode(self, matrix: Tensor) -> dict[str, Tensor]:
        """Rows of one Hugging Face matrix (this rank's part), with the scales of the whole matrix."""
        if self.full_columns != self.shape.columns:
            matrix = tensor_model_parallel_all_gather(matrix.contiguous(), dim=1)
        assert self.format is not None
        wire = self.format.encode(matrix)
        rows = {name: rows_of(self.format, name, tensor, len(matrix)) for name, tensor in wire.items()}
        own = self._wire_row(self.shape.columns)
        return {name: _own_columns(tensor, own[name].shape[1]) for name, tensor in rows.items()}

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
