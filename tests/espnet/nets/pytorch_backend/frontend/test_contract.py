"""What `FrontendInterface` promises, of every encoder that is registered."""

import pytest
import torch
from torch.nn import functional as F

from espnet.formats import AUDIO_RATE, SAMPLES_PER_FRAME, VIDEO_RATE
from espnet.nets.encoders import AUDIO_ENCODERS, FRAME_RATES, TABLES, VISION_ENCODERS
from espnet.nets.model_options import ModelOptions
from espnet.nets.pytorch_backend.e2e_asr_conformer import (
    build_audio_frontend,
    build_video_frontend,
)
from espnet.nets.pytorch_backend.frontend.interface import FrontendInterface
from espnet.option_tree import from_flat

FRAMES = (5, 1, 3)  # at 25 a second
ODD_SAMPLES = (13, 400, 639)  # beyond them
ROWS = VISION_ENCODERS | AUDIO_ENCODERS
BUILDERS = {"vision": build_video_frontend, "audio": build_audio_frontend}
# Convolutions over batches of different shape sum in another order.
CLOSE = {"atol": 2e-5, "rtol": 1e-4}

every_encoder = pytest.mark.parametrize("name", ROWS)


@pytest.fixture
def make(tiny_checkpoints):
    """Builds a small front-end, from a tiny checkpoint if it has one."""

    def frontend(name, **options):
        word = "vision" if name in VISION_ENCODERS else "audio"
        options = {f"{word}_encoder": name, "video_width": 2, "audio_width": 2, **options}
        if ROWS[name].pretrained:
            options[f"{word}_encoder_name"] = str(tiny_checkpoints / name)
        if (freeze := options.pop("freeze", None)) is not None:
            options[f"freeze_{word}_encoder"] = freeze
        torch.manual_seed(0)
        return BUILDERS[word](from_flat(ModelOptions, options).resolved())

    return frontend


def batch(name, seed=1):
    """Three utterances, which loud padding follows, that of the longest too."""
    generator = torch.Generator().manual_seed(seed)
    lengths, shape = torch.tensor(FRAMES), (1, 48, 48)
    if name in AUDIO_ENCODERS:
        lengths, shape = lengths * SAMPLES_PER_FRAME + torch.tensor(ODD_SAMPLES), (1,)
    longest = int(lengths.max()) * 5 // 4
    x = torch.randn(len(lengths), longest, *shape, generator=generator)
    for row, length in enumerate(lengths):
        x[row, length:] = 9.0
    return x, lengths


def backpropagate(frontend, x, lengths):
    """Gradients of a loss in which every feature has a weight of its own."""
    features, frames = frontend(x, lengths)
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(2))
    (features * weights).sum().backward()
    return {key: parameter.grad for key, parameter in frontend.named_parameters()}


@every_encoder
def test_attributes_and_rates(make, name):
    frontend = make(name)
    assert isinstance(frontend, FrontendInterface)
    assert frontend.frame_rate in FRAME_RATES
    assert hasattr(frontend, "backbone") == ROWS[name].pretrained
    rate = AUDIO_RATE if name in AUDIO_ENCODERS else VIDEO_RATE
    second = torch.tensor([rate, 3 * rate])
    assert frontend.output_lengths(second).tolist() == [
        frontend.frame_rate,
        3 * frontend.frame_rate,
    ]
    assert frontend.speech_lengths(second).equal(frontend.output_lengths(second))


@every_encoder
@torch.no_grad()
def test_padding_changes_nothing(make, name):
    frontend = make(name).eval()
    x, lengths = batch(name)
    together, frames = frontend(x, lengths)
    assert frames.dtype == torch.int64
    assert frames.equal(frontend.output_lengths(lengths))
    assert together.shape == (len(x), together.size(1), frontend.output_dim)
    assert together.size(1) >= frames.max()
    for row, (length, frame) in enumerate(zip(lengths, frames, strict=True)):
        alone, own = frontend(x[row : row + 1, :length], lengths[row : row + 1])
        assert own == frame
        torch.testing.assert_close(together[row, :frame], alone[0, :frame], **CLOSE)
        assert not together[row, frame:].any()


@every_encoder
def test_padding_enters_neither_training_outputs_nor_statistics(make, name):
    frontend = make(name).train()
    x, lengths = batch(name)
    start = {key: value.clone() for key, value in frontend.state_dict().items()}
    expected, frames = frontend(x[:, : lengths.max()], lengths)
    statistics = {key: value.clone() for key, value in frontend.named_buffers()}
    frontend.load_state_dict(start)
    features, _ = frontend(F.pad(x, (*[0, 0] * (x.dim() - 2), 0, 2000), value=5.0), lengths)
    length = frames.max()
    torch.testing.assert_close(features[:, :length], expected[:, :length], **CLOSE)
    torch.testing.assert_close(dict(frontend.named_buffers()), statistics, **CLOSE)


@every_encoder
def test_gradients_reach_all_that_is_trained_and_no_padding(make, name):
    frontend = make(name, freeze=False).train()
    x, lengths = batch(name)
    gradients = backpropagate(frontend, x.requires_grad_(), lengths)
    trained = {key for key, parameter in frontend.named_parameters() if parameter.requires_grad}
    assert {key for key, gradient in gradients.items() if gradient is not None} == trained != set()
    assert all(gradients[key].isfinite().all() for key in trained)
    for row, length in enumerate(lengths):
        assert x.grad[row, :length].any()
        assert not x.grad[row, length:].any()


@every_encoder
def test_frozen_means_eval_mode_and_no_gradients(make, name):
    frontend = make(name, freeze=True)
    x, lengths = batch(name)
    expected, _ = frontend.eval()(x, lengths)
    statistics = {key: value.clone() for key, value in frontend.named_buffers()}
    features, _ = torch.nn.Sequential(frontend).train()[0](x, lengths)
    frozen = [part for part in frontend.children() if [*part.parameters()]]
    assert not any(module.training for part in frozen for module in part.modules())
    assert not features.requires_grad
    torch.testing.assert_close(features, expected, atol=0, rtol=0)
    torch.testing.assert_close(dict(frontend.named_buffers()), statistics, atol=0, rtol=0)


def test_each_encoder_has_one_name():
    assert len(ROWS) == sum(len(table) for table in TABLES.values())
