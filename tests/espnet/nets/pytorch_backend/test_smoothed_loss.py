import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from espnet.nets.pytorch_backend.smoothed_loss import smoothed_loss

BATCH, LENGTH, WIDTH, VOCABULARY = 3, 5, 4, 11
IGNORE = -1
REAL = 5 + 3 + 1  # tokens that are not padding


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(BATCH, LENGTH, WIDTH, generator=generator, requires_grad=True)
    targets = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
    targets[1, 3:] = IGNORE
    targets[2, 1:] = IGNORE
    layer = torch.nn.Linear(WIDTH, VOCABULARY)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
    return layer, features, targets


def loss_of(layer, features, targets, **options):
    options = {"smoothing": 0.1, **options}
    return smoothed_loss(
        layer, features, targets, vocabulary=VOCABULARY, ignore_id=IGNORE, **options
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("max_chunk", [1, 3 * VOCABULARY, 2**24])
def test_is_the_divergence_from_the_smoothed_target(smoothing, max_chunk):
    layer, features, targets = inputs()
    total, correct = torch.zeros(()), 0
    for row, column in zip(features.flatten(0, 1), targets.flatten(), strict=True):
        if column == IGNORE:
            continue
        log_probabilities = layer(row).log_softmax(dim=-1)
        wanted = torch.full((VOCABULARY,), smoothing / (VOCABULARY - 1))
        wanted[column] = 1 - smoothing
        total = total + (torch.xlogy(wanted, wanted) - wanted * log_probabilities).sum()
        correct += int(log_probabilities.argmax() == column)
    loss, found = loss_of(layer, features, targets, smoothing=smoothing, max_chunk=max_chunk)
    torch.testing.assert_close(loss, total)
    assert found == correct
    expected = torch.autograd.grad(total, (features, layer.weight))
    torch.testing.assert_close(torch.autograd.grad(loss, (features, layer.weight)), expected)


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return out


def test_scores_of_a_large_vocabulary_are_never_held_whole():
    layer, features, targets = inputs()
    with LargestTensor() as whole:
        loss_of(layer, features, targets)[0].backward()
    assert whole.numel == REAL * VOCABULARY  # Padding has no scores.
    with LargestTensor() as chunked:
        loss_of(layer, features, targets, max_chunk=2 * VOCABULARY)[0].backward()
    # What is left: the features, and the output layer's own weights.
    assert chunked.numel <= max(2 * VOCABULARY, BATCH * LENGTH * WIDTH, VOCABULARY * WIDTH)


def test_half_precision_scores_are_summed_in_float32():
    layer, features, targets = inputs()
    loss, _ = loss_of(layer.bfloat16(), features.detach().bfloat16(), targets)
    assert loss.dtype == torch.float32
