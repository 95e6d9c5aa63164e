"""What every fusion of the table keeps to."""

import pytest
import torch

from espnet.nets.model_options import FUSIONS, ModelOptions
from espnet.nets.pytorch_backend.e2e_asr_conformer import build_fusion
from espnet.option_tree import changed

WIDTHS, DIM, LENGTHS = {"video": 10, "audio": 24}, 24, torch.tensor([5, 3])


def make(name):
    torch.manual_seed(0)
    return build_fusion(changed(ModelOptions(), fusion=name), WIDTHS, DIM)


def features(padding=0.0):
    torch.manual_seed(1)
    streams = {stream: torch.randn(2, 5, width) for stream, width in WIDTHS.items()}
    for x in streams.values():
        x[1, 3:] = padding
    return streams


@pytest.mark.parametrize("name", FUSIONS)
def test_padding_changes_nothing(name):
    fusion = make(name)
    fused = fusion(features(9.0), LENGTHS)
    assert fused.shape == (2, 5, DIM)
    for row, length in enumerate(LENGTHS):
        alone = {stream: x[[row], :length] for stream, x in features().items()}
        found = fusion(alone, LENGTHS[[row]])
        torch.testing.assert_close(fused[[row], :length], found)


@pytest.mark.parametrize("name", FUSIONS)
def test_gradients_reach_every_parameter_and_stream(name):
    fusion = make(name)
    streams = {stream: x.requires_grad_() for stream, x in features().items()}
    fusion(streams, LENGTHS).square().sum().backward()
    for gradient in (*(p.grad for p in fusion.parameters()), *(x.grad for x in streams.values())):
        assert gradient.isfinite().all()
        assert gradient.any()


@pytest.mark.parametrize("name", FUSIONS)
def test_it_can_start_as_the_audio(name):
    fusion = make(name)
    fusion.pass_on_last()
    torch.testing.assert_close(fusion(features(), LENGTHS), features()["audio"])
