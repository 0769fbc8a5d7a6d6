"""The linear method of every format, none included: load, encode, run, and be loaded again.

A layer is either staged or live. Staged, it has the parameters of a checkpoint, which the model's own loaders know how to fill
(names, fused q/k/v rows, tensor-parallel shards). Live, it has what its kernel needs and the staged tensors are gone. vLLM starts
with a staged layer; an update stages it again with the tensors of the wire.

    create_weights -> [full precision, or codes of an encoded checkpoint] -> process_weights_after_loading -> live
    stage          -> [codes and scales from the stream]                  -> process_weights_after_loading -> live

On a GPU a captured CUDA graph reads the storage of the first live parameters, so later ones are copied into it.

Under tensor parallelism a rank holds the codes and scales that a single one would have for its rows or columns. Wire tensors are
cut like the weight; its one scale, where a format has one, goes to every rank. What is encoded here has its scales from the whole
Hugging Face matrix, which the ranks gather one at a time. Activations are scaled by the rank that multiplies them: in a layer
whose inputs are divided each part of a token has scales of its own."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
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
        self.fused_sizes = sizes  # rows of each matrix that vLLM fuses, over all ranks
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
        self.divides_rows = sum(output_partition_sizes) != output_size
        self.divides_columns = input_size_per_partition != input_size
        self._check_parts(output_partition_sizes)
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
        """What the engine multiplies with, decoded: one float32 matrix per Hugging Face module, gathered from all ranks."""
        if self.format is None or self.kernel is None:
            identity = torch.eye(self.shape.columns, dtype=self.shape.dtype, device=self.shape.device)
            held = list(self.apply(layer, identity).float().T.split(self.shape.partitions))
        else:
            held = self.kernel.decoded(layer, self.format, self.shape.partitions)
        if self.divides_columns:
            return [tensor_model_parallel_all_gather(part.contiguous(), dim=1) for part in held]
        if not self.divides_rows:
            return held
        parts = torch.cat(held).split(layer.logical_widths)
        whole = [_all_rows(part, rows) for part, rows in zip(parts, self.fused_sizes, strict=True)]
        return whole if len(whole) == len(self.names) else [torch.cat(whole)]

    def wire_dtype(self, name: str) -> torch.dtype:
        """Of the tensor `name` on the wire."""
        return self._wire_row(1)[name].dtype

    def wire_rows(self) -> dict[str, int]:
        """Rows that an update brings for each parameter of the weight, over all ranks and fused matrices."""
        assert self.format is not None
        names = ["weight"] if self.format.name == "none" else list(self._wire_row(1))
        return {name: sum(num_wire_rows(self.format, name, size) for size in self.full_sizes) for name in names}

    def _wire_row(self, columns: int) -> dict[str, Tensor]:
        """Wire tensors, without content, of a weight of one row and so many columns, or the next more that can be encoded."""
        return _wire_row(self.config.format, columns)

    def _check_parts(self, rows: list[int]) -> None:
        """Raises ValueError where the format cannot be cut as the layer is; rows: this rank's of each fused matrix."""
        if self.config.is_ignored(self.names):
            return
        columns = self.shape.columns if self.divides_columns else 0
        try:
            for count in rows:
                self.config.format.check_part(count if self.divides_rows else 0, columns)
        except ValueError as error:
            size = get_tensor_model_parallel_world_size()
            raise ValueError(f"rollout.tensor_parallel_size={size} cuts {', '.join(self.names)} into parts: {error}") from error

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

    def _encode(self, part: Tensor) -> dict[str, Tensor]:
        """Rows of this rank's part of one Hugging Face matrix, with the scales of the whole matrix."""
        format, matrix = self.format, part
        assert format is not None
        if self.divides_columns:
            matrix = tensor_model_parallel_all_gather(part.contiguous(), dim=1)
        elif self.divides_rows and format.matrix_tensors:
            matrix = tensor_model_parallel_all_gather(part.contiguous(), dim=0)  # replicated KV heads several times
        wire = format.encode(matrix)
        rows = {name: rows_of(format, name, tensor, len(matrix)) for name, tensor in wire.items()}
        own = self._wire_row(self.shape.columns)
        return {name: _own_part(tensor, len(part), own[name].shape[1]) for name, tensor in rows.items()}

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


@lru_cache(maxsize=1024)
def _wire_row(format: QuantizationFormat, columns: int) -> dict[str, Tensor]:
    """What QurlLinearMethod._wire_row returns; a model has few widths, and asks for them several times a layer and update."""
    multiple = format.column_multiple
    with torch.device("cpu"):
        wire = format.wire_row(-(-columns // multiple) * multiple)
    return {name: rows_of(format, name, tensor, 1).to("meta") for name, tensor in wire.items()}


def _own_part(tensor: Tensor, rows: int, columns: int) -> Tensor:
    """This rank's part, of so many rows and columns, of what all ranks' parts make up; a scale of whole rows is not divided."""
    for dim, size in enumerate((rows, columns)):
        if tensor.shape[dim] != size:
            tensor = tensor.narrow(dim, get_tensor_model_parallel_rank() * size, size)
    return tensor.contiguous()


def _all_rows(part: Tensor, rows: int) -> Tensor:
    """The matrix [rows, I] of which every rank has a part. Key and value heads that are fewer than the ranks lie on several."""
    if len(part) == rows:
        return part
    gathered = tensor_model_parallel_all_gather(part.contiguous(), dim=0)
    num_copies = len(gathered) // rows
    return gathered.unflatten(0, (-1, len(part)))[::num_copies].flatten(0, 1)
