"""Every kind of encoder with every decoder: overfitting four utterances, saving, scoring."""

import pytest
import torch

import train
from datamodule.loaders import model_inputs
from espnet.utils.building import build_data, build_model, build_text_transform
from espnet.utils.checkpoint import load_weights, read_state_dict
from lightning import ModelModule
from tests.tables import PRETRAINED

ENCODERS = {
    "resnet_resnet1d": ("resnet", "resnet1d"),
    "clip_whisper": ("clip", "whisper"),
    "vit_wavlm": ("vit", "wavlm"),
}
TRAINED = "--no-freeze-decoder"  # Frozen random output layers are too small to be sure of a word.
DECODERS = {
    "transformer": [],
    "llama": ["--decoder", "llama", "--llama-cross-every", "2", TRAINED],
    "llama_prefix": ["--decoder", "llama", "--llama-conditioning", "prefix", TRAINED],
    "whisper": ["--decoder", "whisper", TRAINED],
}
STEPS = 800


@pytest.fixture
def parts(corpus, tiny_checkpoints):
    """Options, vocabulary and the batch of four utterances, for a command line's encoders."""

    def of(vision, audio, decoder):
        words = [*decoder, "--vision-encoder", vision, "--audio-encoder", audio]
        for flag in ("--vision-encoder", "--audio-encoder", "--decoder"):
            if flag in words and (name := words[words.index(flag) + 1]) in PRETRAINED:
                words += [f"{flag}-name", str(tiny_checkpoints / name)]
        options, _ = train.parse_args(
            [
                *["--exp-name", "x", "--root-dir", str(corpus), "--train-file", "train.csv"],
                *["--val-file", "val.csv", "--num-workers", "0", "--crop-size", "48"],
                *["--adim", "64", "--aheads", "4", "--eunits", "64", "--elayers", "1"],
                *["--dunits", "64", "--dlayers", "1", "--cnn-module-kernel", "7"],
                *["--video-width", "2", "--audio-width", "2", "--dropout-rate", "0"],
                *["--beam-size", "3", *words],
            ]
        )
        transform = build_text_transform(options.model.decoder, options.data)
        data = build_data(options, options.model.encoders.modality, transform)
        data.setup("validate")
        (batch,) = data.val_dataloader()
        return options, transform, batch

    return of


def module_of(options, transform):
    model = build_model(options.model, transform)
    return ModelModule(model, transform, options.training, options.search)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("encoders", ENCODERS)
def test_overfits_and_scores_the_same_after_saving(parts, encoders, decoder, tmp_path):
    options, transform, batch = parts(*ENCODERS[encoders], DECODERS[decoder])
    torch.manual_seed(0)
    module = module_of(options, transform)
    model = module.model
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3, weight_decay=0.0)
    expected = [transform.post_process(row) for row in batch["targets"]]
    found = []
    for step in range(STEPS):
        loss = model(*model_inputs(batch), batch["targets"])[0]
        optimizer.zero_grad()
        loss.backward()
        assert loss.isfinite()
        if step == 0:
            for name, parameter in trained.items():
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all(), name
        torch.nn.utils.clip_grad_norm_(trained.values(), 5.0)
        optimizer.step()
        if step % 20 == 19 and loss < 1:
            module.eval()
            found = [result.hypothesis for result in module.decode(batch)]
            module.train()
            if found == expected:
                break
    assert found == expected
    # For the table in docs/results.md.
    print(f"{encoders}, {decoder}: overfitted after {step + 1} steps")

    module.eval()
    before = module.decode(batch)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    torch.manual_seed(1)
    fresh = module_of(options, transform).eval()
    path = tmp_path / "model.pth"
    load_weights(fresh.model, read_state_dict(path), path)
    for one, two in zip(before, fresh.decode(batch), strict=True):
        assert one.hypothesis == two.hypothesis
        assert one.score == two.score
