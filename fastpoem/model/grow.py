"""Rows of an embedding for ids that training has never seen.

They are drawn about the mean of the rows that were trained, as transformers' `resize_token_embeddings` does. The embedding is the head
too: a row's product with a state is its logit, and the mean's logit is the mean logit. By convexity such an id gets no more than an
average id's probability, so k new ids among n take at most k / (n + k) of it and the model goes on as it was (Hewitt, "Initializing New
Word Embeddings for Pretrained Language Models", 2021). Rows drawn as if from scratch promise nothing of the kind.
"""

import torch
from torch import Tensor

SPREAD = 0.1  # of the trained rows' own, so that no two new rows are the same


@torch.no_grad()
def draw_rows(embedding: Tensor, fresh: range, seed: int) -> None:
    """Fill the rows `fresh` of `embedding` (V, D) from those before them."""
    trained = embedding[: fresh.start].double()
    std, mean = torch.std_mean(trained, dim=0)  # (D,)
    noise = torch.randn(len(fresh), embedding.shape[1], generator=torch.Generator().manual_seed(seed))
    embedding[fresh.start : fresh.stop] = (mean + SPREAD * std * noise).to(embedding.dtype)
