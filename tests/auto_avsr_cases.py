"""The reference cases of auto_avsr: their weights, models and inputs, made again."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch

from espnet.nets.pytorch_backend.e2e_asr_conformer import E2E

DATA = Path(__file__).parent / "data"
CASES = json.loads((DATA / "auto_avsr_reference.json").read_text())
FULL_SIZE = json.loads((DATA / "auto_avsr_state_dict.json").read_text())


def fill(shapes):
    """Weights by the rule that the reference figures were made with."""
    state = {}
    for name, (shape, dtype) in shapes.items():
        z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        if dtype == "int64":
            value = np.zeros(shape)
        elif name.endswith("running_var"):
            value = 1 + 0.1 * np.abs(z)
        elif name.endswith(("running_mean", ".bias")):
            value = 0.1 * z
        elif len(shape) == 1:
            value = 1 + 0.1 * z
        else:
            value = z / np.sqrt(np.prod(shape[1:]))
        state[name] = torch.tensor(value, dtype=getattr(torch, dtype))
    return state


def build(case):
    """The case's model with its weights, in evaluation mode."""
    sizes = {name: size for name, size in case["dims"].items() if name != "kernel"}
    model = E2E.from_keywords(
        case["odim"],
        case["modality"],
        case["ctc_weight"],
        cnn_module_kernel=case["dims"]["kernel"],
        **sizes,
    )
    model.load_state_dict(fill(case["state_dict"]))
    return model.eval()


def inputs(case):
    """The case's batch: features, their lengths and padded targets."""
    rs = np.random.RandomState(case["seed"])
    frames = case["frames"]
    is_video = case["modality"] == "video"
    shape = (max(frames), 1, 88, 88) if is_video else (640 * max(frames), 1)
    x = torch.tensor(rs.standard_normal((len(frames), *shape)), dtype=torch.float32)
    lengths = torch.tensor(frames) * (1 if is_video else 640)
    targets = torch.full((len(frames), max(case["label_lens"])), -1)
    for row, length in zip(targets, case["label_lens"], strict=True):
        row[:length] = torch.tensor(rs.randint(1, case["odim"] - 1, size=length))
    return x, lengths, targets
