"""The decoder's loss: label-smoothed cross-entropy, in chunks where the vocabulary is large."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from espnet.nets.pytorch_backend.nets_utils import send

MAX_CHUNK = 2**24  # scores that are held at once, 64 MiB in float32


def smoothed_loss(
    project: Callable[[Tensor], Tensor],
    features: Tensor,
    targets: Tensor,
    *,
    vocabulary: int,
    smoothing: float,
    ignore_id: int,
    max_chunk: int = MAX_CHUNK,
) -> tuple[Tensor, Tensor]:
    """Kullback-Leibler divergence from a target that gives `smoothing` to the V - 1 other tokens.

    The scores of a large vocabulary are computed a chunk of positions at a time, and again in the
    backward pass: (B, U, V) is never held whole.

    Source: Szegedy et al., Rethinking the Inception Architecture, 2016. PyTorch's cross-entropy,
    which smooths over all V tokens, gives it once the rate is rescaled and the target's entropy
    taken off.

    Args:
        project: The output layer, (N, D) -> (N, V).
        vocabulary: V.
        features: Decoder features, (B, U, D).
        targets: Columns of V, (B, U), padded with `ignore_id`, on the host.
        smoothing: Probability that the target leaves to the other tokens.
        ignore_id: What pads targets.
        max_chunk: Scores that are held at once.

    Returns:
        The sum over all tokens, and how many of them get the highest score.
    """
    targets = targets.flatten()
    real = (targets != ignore_id).nonzero().squeeze(1)  # Padding is not scored.
    rows = features.flatten(0, 1).index_select(0, send(real, features.device))
    columns = send(targets[real], features.device)
    size = max(1, max_chunk // vocabulary)

    def of_chunk(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        scores = project(rows)
        loss = F.cross_entropy(
            scores.float(),
            columns,
            label_smoothing=smoothing * vocabulary / (vocabulary - 1),
            reduction="sum",
        )
        with torch.no_grad():
            correct = (scores.argmax(dim=-1) == columns).sum()
        return loss, correct

    if len(rows) <= size:
        loss, correct = of_chunk(rows, columns)
    else:
        parts = [
            checkpoint(of_chunk, *chunk, use_reentrant=False)
            for chunk in zip(rows.split(size), columns.split(size), strict=True)
        ]
        loss, correct = (sum(values) for values in zip(*parts, strict=True))
    share = torch.tensor([1 - smoothing, smoothing])
    tokens = torch.tensor([1.0, float(vocabulary - 1)])
    entropy = -torch.special.xlogy(share, share / tokens).sum()
    return loss - len(columns) * entropy.item(), correct
