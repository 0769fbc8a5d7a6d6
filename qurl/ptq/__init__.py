"""Post-training quantization: encoded checkpoints that vLLM serves where qurl is installed, what quantization costs in perplexity
by the reference arithmetic of a format, and the precision of Ax-BxP that keeps it within a bound."""

from qurl.ptq.checkpoint import QuantizeReport, QuantizeSettings, quantize_folder
from qurl.ptq.perplexity import DocumentLoss, document_losses, encode_documents, replace_linears
from qurl.ptq.statistics import Estimate, divergence, increase, perplexity, ratio

__all__ = [
    "DocumentLoss", "Estimate", "QuantizeReport", "QuantizeSettings", "divergence", "document_losses", "encode_documents",
    "increase", "perplexity", "quantize_folder", "ratio", "replace_linears",
]
