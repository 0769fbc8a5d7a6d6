"""A model folder on a text, in full precision and quantized: the pieces that the commands put together."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qurl.data.documents import load_documents
from qurl.ptq.checkpoint import folder_digest
from qurl.ptq.journal import journaled_losses
from qurl.ptq.perplexity import DocumentLoss, document_losses, encode_documents, replace_linears
from qurl.quantization import QuantizationFormat
from qurl.quantization.source import INDEX

Replace = Callable[[Any], None]
"""Changes a transformers model, in float32, in place."""


class Text:
    """Held-out text, cut into windows by a model's tokenizer."""

    def __init__(
        self, model: Path, sources: Sequence[str], max_documents: int | None, context: int, option: str = "--text"
    ) -> None:
        """option: that names the sources, for errors. Raises ValueError for sources that cannot be read, and a folder without a
        tokenizer."""
        from transformers import AutoTokenizer

        documents = [document for source in sources for document in load_documents(source, option)][:max_documents]
        try:
            tokenizer = AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise ValueError(f"{model} has no tokenizer that transformers can load: {error}") from error
        self.model = model
        self.sources = list(sources)
        self.context = context
        self.documents = encode_documents(documents, tokenizer, context, option)

    @property
    def num_tokens(self) -> int:
        """That are predicted."""
        return sum(len(window) - 1 for document in self.documents for window in document)

    def losses(
        self, path: Path, question: Mapping[str, Any], replace: Replace | None, progress: Callable[[int], None] = lambda done: None
    ) -> list[DocumentLoss]:
        """Of each document under the model after `replace`, kept in the file `path`; question: what `replace` does.

        Without one, of the model in full precision."""
        question = {**question, "model": folder_digest(self.model)}

        def measure(skip: int) -> Iterator[DocumentLoss]:
            full_precision = load_float32(self.model)
            model = full_precision if replace is None else copy.deepcopy(full_precision)
            if replace is not None:
                replace(model)
            return document_losses(model, full_precision, self.documents[skip:], lambda done: progress(skip + done))

        found = journaled_losses(path, question, self.documents, measure)
        progress(len(found))
        return found


def load_float32(folder: Path) -> Any:
    """The causal language model of a folder, on the GPU where there is one. Raises ValueError where weights are missing."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, found = loaded
    if found["missing_keys"]:
        raise ValueError(f"{folder}: {sorted(found['missing_keys'])[0]} is missing; give a complete checkpoint")
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def inputs_of(
    model: Any, documents: Sequence[Sequence[list[int]]], targets: Sequence[str], num_tokens: int | None = None
) -> dict[str, Tensor]:
    """Activations [T, I] that enter each target, on the first window of each document.

    num_tokens: at most so many of a window, spread evenly; None: all."""
    found: dict[str, list[Tensor]] = {name: [] for name in targets}

    def keep(name: str, module: nn.Module, args: tuple[Tensor]) -> None:
        tokens = args[0].flatten(0, -2)
        found[name].append(tokens if num_tokens is None else tokens[:: -(-len(tokens) // num_tokens)].clone())

    hooks = [model.get_submodule(name).register_forward_pre_hook(partial(keep, name)) for name in targets]
    for document in documents:
        model(input_ids=torch.tensor([document[0]], device=model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def quantized_in_memory(
    quantization: QuantizationFormat, targets: Sequence[str], *, weights: bool = True, activations: bool = True
) -> Replace:
    """Encodes the modules `targets` of the model that it is given."""

    def replace(model: Any) -> None:
        wires = {name: quantization.of_layer(name).encode(model.get_submodule(name).weight) for name in targets}
        replace_linears(model, quantization, wires, weights=weights, activations=activations)

    return replace


def quantized_on_disk(checkpoint: Path, quantization: QuantizationFormat, modules: Sequence[str]) -> Replace:
    """Takes the wire tensors of an encoded checkpoint."""
    from safetensors import safe_open

    def replace(model: Any) -> None:
        with ExitStack() as stack:
            weight_map = json.loads((checkpoint / INDEX).read_text())["weight_map"]
            readers = {file: stack.enter_context(safe_open(checkpoint / file, "pt")) for file in sorted(set(weight_map.values()))}
            wires: dict[str, dict[str, Tensor]] = {name: {} for name in modules}
            for name, file in weight_map.items():
                module, _, suffix = name.rpartition(".")
                if module in wires and suffix != "bias":
                    wires[module][suffix] = readers[file].get_tensor(name).to(model.device)
        replace_linears(model, quantization, wires)

    return replace
