import pytest
import torch

from espnet.nets.model_options import ModelOptions
from espnet.nets.pytorch_backend.e2e_asr_conformer import build_fusion
from espnet.nets.pytorch_backend.fusion.concat import ConcatFusion
from espnet.option_tree import changed

WIDTHS = {"video": 3, "audio": 5}


def features():
    torch.manual_seed(0)
    return {stream: torch.randn(2, 4, width) for stream, width in WIDTHS.items()}


def test_concatenates_in_the_order_of_the_streams_and_projects():
    fusion, streams = ConcatFusion(WIDTHS, 6), features()
    expected = streams["video"] @ fusion.weight[:, :3].T + streams["audio"] @ fusion.weight[:, 3:].T
    backwards = dict(reversed(streams.items()))
    torch.testing.assert_close(fusion(backwards, torch.tensor([4, 2])), expected + fusion.bias)
    assert fusion.state_dict().keys() == {"weight", "bias"}  # as auto_avsr's proj_encoder


def test_passes_on_the_last_features():
    fusion, streams = ConcatFusion(WIDTHS, 5), features()
    fusion.pass_on_last()
    torch.testing.assert_close(fusion(streams, torch.tensor([4, 2])), streams["audio"])


def test_an_unknown_fusion_is_refused():
    with pytest.raises(ValueError, match="fusion 'sum' is unknown: choose concat"):
        build_fusion(changed(ModelOptions(), fusion="sum"), WIDTHS, 6)
