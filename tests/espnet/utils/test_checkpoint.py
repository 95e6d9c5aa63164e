import pickle

import pytest
import torch

from espnet.nets.pytorch_backend.e2e_asr_conformer import E2E
from espnet.utils.checkpoint import (
    average_checkpoints,
    load_weights,
    read_checkpoint,
    read_state_dict,
    transfer_weights,
)
from tests.auto_avsr_cases import CASES, build, fill

SIZES = {"adim": 8, "aheads": 2, "eunits": 8, "elayers": 1, "dunits": 8, "dlayers": 1}


def make(modality="audio", odim=7, **options):
    return E2E(odim, modality, video_width=2, audio_width=2, **{**SIZES, **options})


def randomise(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.randn(value.shape, generator=generator))
    return model


def same(module, other):
    pairs = zip(module.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(one, two) for one, two in pairs)


class Evil:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_code_is_never_unpickled(tmp_path, capsys):
    path = tmp_path / "evil.pth"
    torch.save({"weight": torch.ones(2), "extra": Evil()}, path)
    with pytest.raises(
        ValueError, match=r"evil.pth is not loaded, since it holds more than"
    ) as info:
        read_checkpoint(path)
    assert "unpickled" not in capsys.readouterr().out
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no checkpoint at all", "damaged or no PyTorch checkpoint|holds more than"),
        (b"", "damaged or no PyTorch checkpoint"),
        (pickle.dumps([1, 2], protocol=2), "damaged or no PyTorch checkpoint|holds more than"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as info:
        read_checkpoint(path)
    assert "\n" not in str(info.value)


def test_missing_and_empty_checkpoints(tmp_path):
    with pytest.raises(ValueError, match=r"gone.pth does not exist: check the path"):
        read_checkpoint(tmp_path / "gone.pth")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list, a state dict is expected"):
        read_checkpoint(tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="holds no weights"):
        read_state_dict(tmp_path / "empty.pth")


def test_a_truncated_checkpoint_is_damaged(tmp_path):
    torch.save(make().state_dict(), tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"half.pth cannot be read \(.*damaged"):
        read_checkpoint(tmp_path / "half.pth")


def test_lightning_checkpoints_and_plain_state_dicts_are_read_alike(tmp_path):
    model = randomise(make(), 0)
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    wrapped = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": wrapped, "epoch": 1}, tmp_path / "run.ckpt")
    for name in ("plain.pth", "run.ckpt"):
        other = make()
        load_weights(other, read_state_dict(tmp_path / name), name)
        assert same(model, other)


def test_mismatches_are_named_with_their_shapes():
    state = make(odim=9).state_dict()
    with pytest.raises(
        ValueError,
        match=r"nine.pth does not fit the model: decoder.embed.0.weight is \(9, 8\), not \(7, 8\); "
        r".* and 2 more: give the model options and the vocabulary",
    ):
        load_weights(make(), state, "nine.pth")
    state = make().state_dict()
    state["surplus"] = state.pop("proj_encoder.bias")
    with pytest.raises(ValueError, match=r"proj_encoder.bias is missing; surplus is unknown:"):
        load_weights(make(), state, "odd.pth")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["modality"])
def test_auto_avsr_state_dicts_load(tmp_path, case):
    path = tmp_path / "published.pth"
    torch.save(fill(case["state_dict"]), path)
    model, reference = build(case), build(case)
    randomise(model, 1)
    load_weights(model, read_state_dict(path), path)
    assert same(model, reference)


def test_transfer_of_the_whole_model(tmp_path):
    torch.save(randomise(make(), 0).state_dict(), tmp_path / "model.pth")
    model = make()
    transfer_weights(model, tmp_path / "model.pth")
    assert same(model, randomise(make(), 0))


def test_transfer_of_parts(tmp_path):
    source = randomise(make("video"), 0)
    torch.save(source.state_dict(), tmp_path / "video.pth")
    model = make("audiovisual")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    transfer_weights(model, tmp_path / "video.pth", frontend=True)
    assert same(model.video_frontend, source.video_frontend)
    rest = {k: v for k, v in model.state_dict().items() if not k.startswith("video_frontend.")}
    assert all(torch.equal(value, before[name]) for name, value in rest.items())
    transfer_weights(model, tmp_path / "video.pth", encoder=True)
    assert same(model.encoder, source.encoder)


def test_transfer_of_a_word_classifiers_frontend(tmp_path):
    """Bare names under `model_state_dict`, with a classifier that is left out."""
    source = randomise(make("video"), 0)
    state = source.video_frontend.state_dict()
    content = {"model_state_dict": {**state, "tcn.weight": torch.ones(3)}}
    torch.save(content, tmp_path / "lrw.pth")
    model = make("video")
    transfer_weights(model, tmp_path / "lrw.pth", frontend=True)
    assert same(model.video_frontend, source.video_frontend)


def test_transfer_from_a_checkpoint_without_the_part(tmp_path):
    torch.save(make("video").state_dict(), tmp_path / "video.pth")
    with pytest.raises(ValueError, match="has no weights for video_frontend or audio_frontend"):
        transfer_weights(make("audio"), tmp_path / "video.pth", frontend=True)


def test_average_is_the_mean_of_weights_and_the_last_of_counters(tmp_path):
    paths, models = [], []
    for number in range(3):
        model = randomise(make(), number)
        for name, value in model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                value.fill_(10 * number)
        state = {f"model.{name}": value for name, value in model.state_dict().items()}
        paths.append(tmp_path / f"epoch={number}.ckpt")
        torch.save({"state_dict": state}, paths[-1])
        models.append(model.state_dict())
    average = average_checkpoints(paths)
    assert average.keys() == models[0].keys()
    for name, value in average.items():
        assert value.dtype == models[0][name].dtype
        if value.is_floating_point():
            expected = torch.stack([model[name] for model in models]).mean(dim=0)
            torch.testing.assert_close(value, expected)
        else:
            assert value.item() == 20
