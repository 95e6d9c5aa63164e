"""A corpus of a few sentences and models trained on it, made once for all tests."""

import pytest
import torch

SMALL_MODEL = [
    *["--adim", "16", "--aheads", "2", "--eunits", "32", "--dunits", "32"],
    *["--elayers", "1", "--dlayers", "1", "--cnn-module-kernel", "7"],
    *["--video-width", "2", "--audio-width", "2", "--crop-size", "32"],
]


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Threads that wait for each other make small models slow, and sums depend on their number."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A demo corpus of 12 training, 4 validation and 4 test sentences."""
    from datamodule.demo_corpus import make_demo_corpus

    root = tmp_path_factory.mktemp("corpus")
    make_demo_corpus(str(root), num_train=12, num_val=4, num_test=4, seed=3, progress=False)
    return root


@pytest.fixture(scope="session")
def train_arguments(corpus, tmp_path_factory):
    """Command line of train.py for a small model, by run name, modality and further options."""
    exp_dir = tmp_path_factory.mktemp("exp")

    def arguments(name, modality, *more):
        return [
            *["--exp-dir", str(exp_dir), "--exp-name", name, "--modality", modality],
            *["--root-dir", str(corpus), "--train-file", "train.csv", "--val-file", "val.csv"],
            *["--max-epochs", "2", "--warmup-epochs", "1", "--max-frames", "400"],
            *["--num-workers", "0", "--accelerator", "cpu", "--logger", "none"],
            *["--beam-size", "3", *SMALL_MODEL, *more],
        ]

    arguments.exp_dir = exp_dir
    return arguments


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory):
    """Folder of tiny checkpoints with random weights, one for each pretrained part."""
    from espnet.utils.tiny_checkpoints import make_tiny_checkpoints

    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_checkpoints(folder)
    return folder
