"""Post-training quantization: encoded checkpoints that vLLM serves where qurl is installed, and what quantization costs in
perplexity by the reference arithmetic of a format."""

from qurl.ptq.checkpoint import QuantizeReport, QuantizeSettings, quantize_folder
from qurl.ptq.perplexity import DocumentLoss, document_losses, encode_documents, replace_linears
from qurl.ptq.statistics import Estimate, divergence, increase, perplexity, ratio

__all__ = [
    "DocumentLoss", "Estimate", "QuantizeReport", "QuantizeSettings", "divergence", "document_losses", "encode_documents",
    "increase", "perplexity", "quantize_folder", "ratio", "replace_linears",
]
