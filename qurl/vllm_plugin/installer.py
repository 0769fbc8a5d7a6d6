"""New weights into a living model.

Tensors arrive under their Hugging Face names, in any order and in any portions. A portion goes through the model's own
load_weights, which knows how vLLM fuses and shards, in one call: vLLM walks over all modules in every call, so that one call a
tensor takes 14 times as long (64 layers). A linear layer is made live as soon as all its tensors have come, so that at most the
layers of a portion are held twice. What one update must bring is the whole model: `finish` names what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.config import set_current_vllm_config
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from qurl.vllm_plugin.compat import vllm_parameter_name
from qurl.vllm_plugin.linear import QurlLinearMethod

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class WeightInstaller:
    """Replaces the weights of a model that was built with qurl's quantization method.

    Raises ValueError for a model whose linear layers have another method."""

    def __init__(self, model: nn.Module, vllm_config: VllmConfig) -> None:
        self.model = model
        self.vllm_config = vllm_config
        self.linears: dict[str, tuple[Any, QurlLinearMethod]] = {}
        for name, module in model.named_modules():
            if not isinstance(module, LinearBase):
                continue
            if not isinstance(module.quant_method, QurlLinearMethod):
                raise ValueError(
                    f"{name} runs on {type(module.quant_method).__name__}, which qurl cannot update; "
                    "start the engine with qurl.vllm_plugin.engine_args"
                )
            self.linears[name] = module, module.quant_method
        self._expected = self._rows_of_an_update()
        self._aliases = {name for name, _ in model.named_parameters(remove_duplicate=False)} - {
            name for name, _ in model.named_parameters()
        }
        self.begin()

    def begin(self) -> None:
        """Start an update, forgetting what an unfinished one brought."""
        self._missing_rows = dict(self._expected)
        self._arrived: set[str] = set()
        self._staged: set[str] = set()

    @torch.no_grad()
    def install(self, items: Mapping[str, Tensor]) -> None:
        """Take some tensors of the update: Hugging Face name -> wire tensor. They are copied, not kept.

        Raises RuntimeError for a name the model does not have, one that comes twice, or a tensor in another format or shape."""
        with set_current_vllm_config(self.vllm_config):
            accepted: list[tuple[str, Tensor]] = []
            touched: dict[str, None] = {}  # linear layers that get a tensor, in order
            for name, tensor in items.items():
                target = vllm_parameter_name(self.model, name)
                if target is None or target in self._aliases:
                    continue
                module_name, _, leaf = target.rpartition(".")
                if module_name in self.linears and target in self._expected:
                    tensor = self._checked(name, leaf, module_name, tensor)
                    touched[module_name] = None
                self._count(name, target, tensor)
                accepted.append((name, tensor))
            for module_name in touched:
                if module_name not in self._staged:
                    self._staged.add(module_name)
                    module, method = self.linears[module_name]
                    method.stage(module)
            if accepted:
                load_weights: Any = self.model.load_weights
                # sorted: the loader calls a submodule once for each run of names below it
                load_weights(sorted(accepted, key=lambda item: item[0]))
            for module_name in touched:
                module, method = self.linears[module_name]
                if all(self._missing_rows.get(f"{module_name}.{leaf}", 0) == 0 for leaf in (*method.wire_rows(), "bias")):
                    method.process_weights_after_loading(module)

    @torch.no_grad()
    def finish(self) -> None:
        """Complete the update. Raises RuntimeError naming what did not arrive; the model must then not be used."""
        missing = [name for name, rows in self._missing_rows.items() if rows > 0]
        if missing:
            listed = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            counts = f"{len(missing)} of {len(self._expected)}"
            raise RuntimeError(f"the weight update lacks {counts} parameters, in whole or part: {listed}")
        with set_current_vllm_config(self.vllm_config):
            for module in self.model.modules():
                if isinstance(module, VocabParallelEmbedding):  # an output head packs its own copy, also of a tied embedding
                    module.quant_method.process_weights_after_loading(module)

    @torch.no_grad()
    def read_back(self, module_names: Iterable[str]) -> dict[str, Tensor]:
        """The weights the engine really works with, decoded: Hugging Face module name -> float32 matrix or vector.

        All tensor-parallel ranks call it at once, and get whole ones. Raises ValueError for a module that the model lacks."""
        return {name: self._read_back_one(name) for name in module_names}

    def _count(self, name: str, target: str, tensor: Tensor) -> None:
        """Note that the rows of `target` that `name` holds are about to be loaded. Raises RuntimeError where they cannot be."""
        if target not in self._expected:
            raise RuntimeError(f"the weight update brings {name!r}, which is no parameter of this {type(self.model).__name__}")
        if name in self._arrived:
            raise RuntimeError(f"the weight update brings {name!r} twice")
        rows = tensor.shape[0] if tensor.dim() else 1
        if rows > self._missing_rows[target]:
            raise RuntimeError(f"{name!r} has {rows} rows where {target!r} still misses {self._missing_rows[target]}")
        self._missing_rows[target] -= rows
        self._arrived.add(name)

    def _checked(self, name: str, leaf: str, module_name: str, tensor: Tensor) -> Tensor:
        """The tensor as a fresh engine would hold it. Raises RuntimeError where it is not in the layer's format."""
        _, method = self.linears[module_name]
        assert method.format is not None
        if method.format.name != "none" and leaf != "bias":
            needed = method.wire_dtype(leaf)
            if tensor.dtype != needed:
                raise RuntimeError(
                    f"{name!r} came as {tensor.dtype}, but the engine holds {method.format.name} there, {needed}; "
                    "learner and engines must use the same quantization.format and quantization.ignore"
                )
            return tensor
        if not tensor.is_floating_point():
            raise RuntimeError(f"{name!r} came as {tensor.dtype}, but the engine keeps it in full precision")
        return tensor.to(method.shape.dtype)

    def _rows_of_an_update(self) -> dict[str, int]:
        """Rows that an update must bring for each parameter, summed over tensor-parallel ranks and fused matrices."""
        expected = {}
        for name, parameter in self.model.named_parameters():
            if name.rpartition(".")[0] not in self.linears:
                expected[name] = parameter.shape[0] if parameter.dim() else 1
        for name, module in self.model.named_modules():
            if isinstance(module, VocabParallelEmbedding) and f"{name}.weight" in expected:
                expected[f"{name}.weight"] = module.org_vocab_size  # without vLLM's padding
        for name, (layer, method) in self.linears.items():
            rows = method.wire_rows()
            if getattr(layer, "bias", None) is not None:
                rows["bias"] = rows["weight"]
            expected |= {f"{name}.{leaf}": count for leaf, count in rows.items()}
        return expected

    def _read_back_one(self, hf_module: str) -> Tensor:
        target = vllm_parameter_name(self.model, f"{hf_module}.weight")
        module_name = "" if target is None else target.rpartition(".")[0]
        if module_name in self.linears:
            module, method = self.linears[module_name]
            parts = [name.rpartition(".")[2] for name in method.names]  # the engine's prefix may be another: model, not gpt_neox
            return method.read_back(module)[parts.index(hf_module.rpartition(".")[2])]
        if target not in self._expected and target not in self._aliases:
            raise ValueError(f"{hf_module!r} is no module with a weight in this {type(self.model).__name__}")
        module, weight = self.model.get_submodule(module_name), self.model.get_parameter(target).detach()
        if isinstance(module, VocabParallelEmbedding):
            weight = tensor_model_parallel_all_gather(weight, dim=0)[: module.org_vocab_size]  # without vLLM's padding
        return weight.float().clone()
