"""The policy as training sees it: packed tokens in, one logprob per trained token out.

The costly tensor of this computation is not in the transformer: [tokens, vocabulary] logits in float32 are 20 GB for 32k
tokens of a 150k vocabulary, and backward wants several copies. So the output layer runs only where a token is trained, and
over chunks of tokens (qurl.learner.scored_head)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qurl.learner.decoder import hidden_states, prepare_for_training
from qurl.learner.scored_head import ScoredHead
from qurl.types import KeptTokens


class Policy(nn.Module):
    """A Hugging Face causal language model that returns logprobs of given tokens.

    temperature: the sampler's, > 0; divides the logits, so that logprobs speak of the distribution that is sampled from."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        temperature: float,
        activation_checkpointing: bool = False,
        entropy_gradient: bool = False,
    ):
        """entropy_gradient: keep what backward through the entropy needs, twice the logits of a chunk.

        Raises ValueError for a temperature that training cannot use, or a model whose logits are not its output layer."""
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"rollout.temperature={temperature} cannot be trained on; use a value > 0")
        self.model = model
        _check_output_layer(model)
        prepare_for_training(model, activation_checkpointing)
        output_layer = model.get_output_embeddings()
        self.head = ScoredHead(output_layer, temperature=temperature, entropy_gradient=entropy_gradient)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, loss_mask: Tensor, kept_tokens: KeptTokens | None = None
    ) -> tuple[Tensor, Tensor]:
        """(logprobs, entropy), both [B, L] float32 and 0 where loss_mask is False; entropy has a gradient with entropy_gradient.

        input_ids, position_ids [B, L] int64 and loss_mask [B, L] bool as in MicroBatch. kept_tokens: as there; both
        results are then of the distribution over these tokens alone."""
        rows, columns = loss_mask.nonzero(as_tuple=True)
        before = columns - 1  # what stands before a token predicts it
        hidden = hidden_states(self.model.base_model, input_ids, position_ids)[rows, before]
        logprobs, entropy = self.head(hidden, input_ids[rows, columns], kept_tokens)
        zeros = torch.zeros(loss_mask.shape, dtype=torch.float32, device=loss_mask.device)
        return zeros.index_put((rows, columns), logprobs), zeros.index_put((rows, columns), entropy)


@torch.no_grad()
def _check_output_layer(model: PreTrainedModel) -> None:
    """Some models cap or scale logits after the output layer, which forward() above would miss."""
    ids = torch.tensor([[1, 2, 0]], device=next(model.parameters()).device)
    expected = model(input_ids=ids, use_cache=False).logits
    found = model.get_output_embeddings()(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"model.path: {type(model).__name__} changes logits after its output layer (soft cap or scale), which the learner "
            "does not compute; use a model without it"
        )
