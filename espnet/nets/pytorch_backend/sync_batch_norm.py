"""Batch normalisation over the frames of all processes, for CPUs."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm


class CPUSyncBatchNorm(_BatchNorm):
    """What `torch.nn.SyncBatchNorm`, which takes GPU tensors only, does on CPUs.

    Statistics are sums over all processes, so that a step on several gives what it gives on one.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"input has shape {tuple(x.shape)}, (N, C, ...) is expected")

    def forward(self, x: Tensor) -> Tensor:
        """Normalises each channel.

        Args:
            x: Features, (N, C, ...).

        Returns:
            Features of the same shape.

        Raises:
            ValueError: If there is no channel axis.
        """
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        self._check_input_dim(x)
        axes = [axis for axis in range(x.dim()) if axis != 1]
        exact = x.double()
        count = exact.new_tensor([x.numel() / x.size(1)])
        sums = all_reduce(torch.cat([exact.sum(axes), exact.square().sum(axes), count]))
        total, squares, count = sums.split([x.size(1), x.size(1), 1])
        mean = total / count
        variance = squares / count - mean.square()
        with torch.no_grad():
            self.running_mean.lerp_(mean.float(), self.momentum)
            unbiased = variance * count / (count - 1).clamp(min=1)
            self.running_var.lerp_(unbiased.float(), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        shape = [-1] + [1] * (x.dim() - 2)
        return (exact * scale.view(shape) + shift.view(shape)).to(x.dtype)


def synchronise_batch_norm(module: nn.Module) -> None:
    """Replaces the batch norms of a module, in place; weights and statistics stay.

    Args:
        module: Module whose parts are replaced.
    """
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            synced = CPUSyncBatchNorm(child.num_features, child.eps, child.momentum)
            vars(synced).update(vars(child))  # its mode, and what is frozen, too
            setattr(module, name, synced)
        else:
            synchronise_batch_norm(child)
