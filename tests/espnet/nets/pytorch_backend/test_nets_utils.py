import pytest
import torch
from torch import nn

from espnet.nets.pytorch_backend.nets_utils import keep_frozen_in_eval, length_groups


def test_only_wholly_frozen_parts_go_to_eval_mode():
    frozen = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5))
    half = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Dropout(0.5))
    model = nn.Sequential(frozen, half).train()
    frozen.requires_grad_(False)
    half[0].requires_grad_(False)
    keep_frozen_in_eval(model)
    assert not any(module.training for module in frozen.modules())
    assert not half[0].training
    assert all(module.training for module in (model, half, half[1], half[2]))
    before = frozen[0].running_mean.clone()
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)) + 3
    torch.testing.assert_close(frozen(x), x / (1 + frozen[0].eps) ** 0.5)
    assert torch.equal(frozen[0].running_mean, before)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("max_padding", [0.0, 0.1, 0.5])
def test_groups_hold_each_row_once_with_little_padding(seed, max_padding):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 200, (40,), generator=generator).tolist()
    groups = length_groups(lengths, max_padding=max_padding)
    assert sorted(sum(groups, [])) == list(range(40))
    sizes = [[lengths[row] for row in group] for group in groups]
    assert sum(sizes, []) == sorted(lengths, reverse=True)
    for one, following in zip(sizes, sizes[1:] + [[0]], strict=True):
        assert one[-1] >= (1 - max_padding) * one[0]
        assert following[0] < (1 - max_padding) * one[0]  # No group could have been longer.


def test_groups_of_few():
    assert length_groups([]) == []
    assert length_groups([7]) == [[0]]
    assert length_groups([5, 5, 5]) == [[0, 1, 2]]
    assert length_groups([90, 100, 89]) == [[1, 0], [2]]
