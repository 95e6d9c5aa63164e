"""Measures a training step on a ragged batch beside the same work on its real frames only.

`python benchmarks/train_step.py`, in the repository's root, prints a table; a minute or two on two
CPU cores. The model is the audio-visual one of auto_avsr's sizes, with random weights, in training
mode; on a CPU it has 4 of the 12 Conformer blocks. A step is the loss and its gradients, without
the optimiser. The 8 utterances have 40 to 160 frames; of the padded batch, 37.5 % is padding.

The reference computes the same loss from the same weights and never sees a padded batch (a test
compares losses and gradients). What treats each frame, step or token by itself (linear layers,
norms, the ResNet's trunk, the CTC layer) and batch norm take those of all utterances in one row.
What looks beyond them is done for each utterance by itself: convolutions over time, attention, and
the CTC loss. The ResNet of the video is also timed alone, beside the same frames as one utterance
without padding.

On CUDA, further rows are for bfloat16 and torch.compile (on a CPU: `--compile`) beside the step in
float32 as it is. The notes say how many frames and tokens a second that is, and what share of the
time goes neither into matrix products nor into convolutions.
"""

import re
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.profiler import ProfilerActivity, profile

from benchmarks.encoders import Row
from benchmarks.timing import time_in_turns
from espnet.formats import SAMPLES_PER_FRAME
from espnet.nets.pytorch_backend.e2e_asr_conformer import E2E
from espnet.nets.pytorch_backend.transformer.attention import shift_distances

TARGET = 1.15
FRAMES_PER_TOKEN = 4
MATRIX_WORK = re.compile(
    r"gemm|gemv|cutlass|xmma|conv|winograd|wgrad|dgrad|fprop|fmha|flash|nvjet"  # kernels
    r"|^aten::(mm|addmm|bmm|baddbmm|.*scaled_dot_product.*attention.*)$",  # on a CPU
    re.IGNORECASE,
)
NO_MATRIX_WORK = re.compile(r"convert|to_?copy", re.IGNORECASE)


@dataclass(frozen=True)
class Work:
    """How much is computed.

    Attributes:
        elayers: Conformer blocks.
        repeats: Rounds of timing.
        frames: Video frames of each utterance.
        crop: Height and width of the video.
        odim: Vocabulary.
        sizes: Further sizes of the model; those that are not given are auto_avsr's.
    """

    elayers: int
    repeats: int
    frames: tuple[int, ...] = (160, 143, 126, 109, 91, 74, 57, 40)
    crop: int = 88
    odim: int = 5049
    sizes: dict[str, int | float] = field(default_factory=dict)


WORK = {"cpu": Work(elayers=4, repeats=3), "cuda": Work(elayers=12, repeats=10)}


@dataclass(frozen=True)
class Utterance:
    """One utterance of noise.

    Attributes:
        video: (T, 1, H, W).
        audio: (S, 1).
        target: Token ids, (U,).
    """

    video: Tensor
    audio: Tensor
    target: Tensor


def build_model(work: Work, device: torch.device) -> E2E:
    """Builds the recogniser with random weights, in training mode."""
    torch.manual_seed(0)
    return E2E.from_keywords(work.odim, "audiovisual", elayers=work.elayers, **work.sizes).to(
        device
    )


def make_utterances(work: Work, device: torch.device) -> list[Utterance]:
    """Makes utterances of different lengths."""
    generator = torch.Generator().manual_seed(0)
    utterances = []
    for frames in work.frames:
        video = torch.randn(frames, 1, work.crop, work.crop, generator=generator)
        audio = torch.randn(frames * SAMPLES_PER_FRAME, 1, generator=generator)
        tokens = max(1, frames // FRAMES_PER_TOKEN)
        target = torch.randint(1, work.odim - 1, (tokens,), generator=generator)
        utterances.append(Utterance(*(x.to(device) for x in (video, audio, target))))
    return utterances


def padded_step(model: nn.Module, utterances: list[Utterance]) -> Callable[[], Tensor]:
    """Makes the step on a padded batch; it returns the loss."""
    videos = pad_sequence([u.video for u in utterances], batch_first=True)
    audios = pad_sequence([u.audio for u in utterances], batch_first=True)
    targets = [u.target.cpu() for u in utterances]
    targets = pad_sequence(targets, batch_first=True, padding_value=-1)
    frames = torch.tensor([len(u.video) for u in utterances])
    x = {"video": videos, "audio": audios}
    lengths = {"video": frames, "audio": frames * SAMPLES_PER_FRAME}
    return lambda: _backward(model, model(x, lengths, targets)[0])


def reference_step(model: E2E, utterances: list[Utterance]) -> Callable[[], Tensor]:
    """Makes the step on real frames only; it returns the loss."""
    return lambda: _backward(model, RealFramesOnly(model).loss(utterances))


def _backward(model: nn.Module, loss: Tensor) -> Tensor:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return loss.detach()


class RealFramesOnly:
    """The model's mathematics without a padded batch; N frames of all utterances in one row.

    Args:
        model: Recogniser whose weights are used.
    """

    def __init__(self, model: E2E) -> None:
        self.model = model

    def loss(self, utterances: list[Utterance]) -> Tensor:
        """The training loss, a scalar."""
        model = self.model
        frames = [len(u.video) for u in utterances]
        video = self.video_features([u.video for u in utterances])
        audio = self.audio_features([u.audio for u in utterances])
        x = model.proj_encoder(torch.cat([video, audio], dim=-1))
        memory = self.encode(x, frames)
        targets = [u.target for u in utterances]
        loss = model.ctc_weight * self.ctc_loss(memory, frames, targets)
        return loss + (1 - model.ctc_weight) * self.decoder_loss(memory, frames, targets)

    def video_features(self, videos: list[Tensor]) -> Tensor:
        """Videos, (T, 1, H, W) each, to features (N, D)."""
        convolution, norm, activation, pooling = self.model.video_frontend.frontend3D
        images = torch.cat(  # a frame and two to each side as channels, (N, H, W, 5)
            [F.pad(video[:, 0], (0, 0, 0, 0, 2, 2)).unfold(0, 5, 1) for video in videos]
        )
        weight = convolution.weight.squeeze(1).contiguous(memory_format=torch.channels_last)
        images = images.contiguous().permute(0, 3, 1, 2)
        frames = F.conv2d(images, weight, stride=2, padding=3)
        frames = activation(norm(frames.unsqueeze(2)).squeeze(2))
        return self.model.video_frontend.trunk(pooling(frames))

    def audio_features(self, waves: list[Tensor]) -> Tensor:
        """Waveforms, (S, 1) each, to features (N, D)."""
        trunk = self.model.audio_frontend.trunk
        steps = [len(wave) for wave in waves]
        frames = sum(steps) // SAMPLES_PER_FRAME
        x = F.silu(trunk.bn1(_convolve_each(trunk.conv1, torch.cat(waves), steps, frames)))
        steps = [length // 4 for length in steps]
        for block in [*trunk.layer1, *trunk.layer2, *trunk.layer3, *trunk.layer4]:
            shortcut = x
            if block.downsample is not None:
                convolution, norm = block.downsample
                shortcut = norm(F.linear(x[:: block.stride], convolution.weight.squeeze(-1)))
            x = F.silu(block.bn1(_convolve_each(block.conv1, x, steps, frames)))
            steps = [length // block.stride for length in steps]
            x = F.silu(block.bn2(_convolve_each(block.conv2, x, steps, frames)) + shortcut)
        return x.unflatten(0, (-1, 20)).mean(dim=1)

    def encode(self, x: Tensor, frames: list[int]) -> Tensor:
        """The Conformer on frames, (N, D)."""
        encoder = self.model.encoder
        x = encoder.embed(x)
        longest = x.new_empty(1, max(frames), x.size(1))
        encoding = encoder.embed.distances(longest)  # of max(frames) - 1, ..., -(max(frames) - 1)
        for layer in encoder.encoders:
            dropout = layer.dropout
            x = x + 0.5 * dropout(layer.feed_forward_macaron(layer.norm_ff_macaron(x)))
            x = x + dropout(self.attend(layer.self_attn, layer.norm_mha(x), encoding, frames))
            x = x + dropout(self.convolve(layer.conv_module, layer.norm_conv(x), frames))
            x = x + 0.5 * dropout(layer.feed_forward(layer.norm_ff(x)))
            x = layer.norm_final(x)
        return encoder.after_norm(x)

    def attend(
        self, attention: nn.Module, x: Tensor, encoding: Tensor, frames: list[int]
    ) -> Tensor:
        """Self-attention of each utterance with relative positions, (N, D) to (N, D)."""
        heads = attention.heads
        queries, keys, values = (
            _split(linear(x), heads, frames)
            for linear in (attention.linear_q, attention.linear_k, attention.linear_v)
        )
        positions = attention.linear_pos(encoding).unflatten(-1, (heads, -1)).transpose(0, 1)
        scale = (x.size(1) // heads) ** -0.5
        contexts = []
        for query, key, value in zip(queries, keys, values, strict=True):  # (H, T, D/H) each
            length, most = query.size(1), (encoding.size(0) + 1) // 2
            near = positions[:, most - length : most + length - 1]  # (H, 2T - 1, D/H)
            scores = (query + attention.pos_bias_v.unsqueeze(1)) @ near.transpose(1, 2)
            contexts.append(
                F.scaled_dot_product_attention(
                    query + attention.pos_bias_u.unsqueeze(1),
                    key,
                    value,
                    attn_mask=shift_distances(scores) * scale,
                )
            )
        return attention.linear_out(_join(contexts))

    def convolve(self, module: nn.Module, x: Tensor, frames: list[int]) -> Tensor:
        """The convolution module on each utterance, (N, D) to (N, D)."""
        first, last = module.pointwise_cov1, module.pointwise_cov2
        x = F.glu(F.linear(x, first.weight.squeeze(-1), first.bias), dim=-1)
        x = torch.cat([module.convolve_each_channel(part[None])[0] for part in x.split(frames)])
        return F.linear(F.silu(module.norm(x)), last.weight.squeeze(-1), last.bias)

    def ctc_loss(self, memory: Tensor, frames: list[int], targets: list[Tensor]) -> Tensor:
        """CTC loss of frames, (N, D): the mean over the utterances."""
        ctc = self.model.ctc
        posteriors = ctc.log_softmax(ctc.dropout(memory)).split(frames)
        losses = [
            F.ctc_loss(posterior, target, (len(posterior),), (len(target),), reduction="sum")
            for posterior, target in zip(posteriors, targets, strict=True)
        ]
        return sum(losses) / len(losses)

    def decoder_loss(self, memory: Tensor, frames: list[int], targets: list[Tensor]) -> Tensor:
        """Label-smoothed loss of the decoder on frames, (N, D): the mean over the utterances."""
        model, decoder = self.model, self.model.decoder
        ends = targets[0].new_tensor([model.sos]), targets[0].new_tensor([model.eos])
        inputs = [torch.cat([ends[0], target]) for target in targets]
        outputs = torch.cat([torch.cat([target, ends[1]]) for target in targets])
        tokens = [len(part) for part in inputs]
        x = torch.cat([decoder.embed(part[None])[0] for part in inputs])
        for layer in decoder.decoders:
            dropout = layer.dropout
            normed = layer.norm1(x)
            x = x + dropout(_attend(layer.self_attn, normed, tokens, normed, tokens, causal=True))
            x = x + dropout(_attend(layer.src_attn, layer.norm2(x), tokens, memory, frames))
            x = x + dropout(layer.feed_forward(layer.norm3(x)))
        log_probabilities = decoder.logits(decoder.after_norm(x)).float().log_softmax(dim=-1)
        hit = log_probabilities.gather(1, outputs[:, None]).sum()
        others, share = model.odim - 1, model.label_smoothing
        loss = -(1 - share) * hit - share / others * (log_probabilities.sum() - hit)
        parts = torch.tensor([1 - share, share], dtype=torch.float64)
        entropy = -torch.special.xlogy(parts, parts / torch.tensor([1.0, others])).sum()
        return (loss - len(outputs) * float(entropy)) / len(targets)


def _convolve_each(convolution: nn.Conv1d, x: Tensor, lengths: list[int], number: int) -> Tensor:
    """Convolves each utterance over time, (N·P, C) to (N·P / stride, C').

    Cut into its frames, each with the steps around it that the convolution sees: gradients of
    long rows take longer.
    """
    (kernel,), (stride,), (padding,) = (
        convolution.kernel_size,
        convolution.stride,
        convolution.padding,
    )
    steps = len(x) // number  # of a frame
    parts = [F.pad(part, (0, 0, padding, padding)) for part in x.split(lengths)]
    windows = [part.unfold(0, steps + kernel - stride, steps).transpose(1, 2) for part in parts]
    image = torch.cat(windows).transpose(1, 2).unsqueeze(2)  # (N, C, 1, P + kernel - stride)
    convolved = F.conv2d(image, convolution.weight.unsqueeze(2), stride=(1, stride))
    return convolved.squeeze(2).transpose(1, 2).flatten(0, 1)  # (N, C', P') -> (N·P', C')


def _split(x: Tensor, heads: int, lengths: list[int]) -> tuple[Tensor, ...]:
    """(N, D) -> (H, T, D/H) of each utterance."""
    return x.unflatten(-1, (heads, -1)).transpose(0, 1).split(lengths, dim=1)


def _join(contexts: list[Tensor]) -> Tensor:
    """(H, T, D/H) of each utterance -> (N, D)."""
    return torch.cat([context.transpose(0, 1).flatten(1) for context in contexts])


def _attend(
    attention: nn.Module,
    x: Tensor,
    tokens: list[int],
    memory: Tensor,
    frames: list[int],
    *,
    causal: bool = False,
) -> Tensor:
    """Attention of each utterance to its own memory, (N, D) to (N, D)."""
    queries = _split(attention.linear_q(x), attention.heads, tokens)
    keys = _split(attention.linear_k(memory), attention.heads, frames)
    values = _split(attention.linear_v(memory), attention.heads, frames)
    contexts = [
        F.scaled_dot_product_attention(*parts, is_causal=causal)
        for parts in zip(queries, keys, values, strict=True)
    ]
    return attention.linear_out(_join(contexts))


def time_ragged_step(work: Work, device: torch.device) -> Row:
    """Times a step on a ragged batch beside the reference.

    Args:
        work: How much is computed.
        device: Where.

    Returns:
        A row of the table.
    """
    model, utterances = build_model(work, device), make_utterances(work, device)
    steps = [padded_step(model, utterances), reference_step(model, utterances)]
    timings = time_in_turns(steps, device, work.repeats)
    return Row(
        f"training step, {work.elayers} Conformer blocks, {_content(work)} (reference: real "
        "frames only)",
        *(timing.milliseconds for timing in timings),
        target=TARGET,
        faster=False,
        notes=[_speed("float32", steps[0], timings[0].milliseconds, work, device)],
    )


def time_video_resnet(work: Work, device: torch.device) -> Row:
    """Times the video's ResNet on a ragged batch and on one utterance of the same frames.

    Args:
        work: How much is computed.
        device: Where.

    Returns:
        A row of the table.
    """
    frontend = build_model(work, device).video_frontend
    videos = [utterance.video for utterance in make_utterances(work, device)]
    padded, row = pad_sequence(videos, batch_first=True), torch.cat(videos)[None]
    lengths = torch.tensor(work.frames, device=device)

    def run(x: Tensor, lengths: Tensor) -> None:
        _backward(frontend, frontend(x, lengths)[0].sum())

    calls = [partial(run, padded, lengths), partial(run, row, lengths.sum(0, keepdim=True))]
    return Row(
        f"ResNet of the video, {_content(work)} (reference: as one utterance)",
        *(timing.milliseconds for timing in time_in_turns(calls, device, work.repeats)),
        target=TARGET,
        faster=False,
    )


def time_settings(work: Work, device: torch.device) -> list[Row]:
    """Times bfloat16 and torch.compile, each and together, beside float32 without.

    Args:
        work: How much is computed.
        device: Where.

    Returns:
        Rows of the table.
    """
    model, utterances = build_model(work, device), make_utterances(work, device)
    plain = padded_step(model, utterances)
    compiled = padded_step(torch.compile(model), utterances)
    names = {
        "bfloat16": lambda: _in_bfloat16(plain, device),
        "torch.compile": compiled,
        "torch.compile and bfloat16": lambda: _in_bfloat16(compiled, device),
    }
    rows = []
    for name, step in names.items():
        timings = time_in_turns([step, plain], device, max(2, work.repeats))
        rows.append(
            Row(
                f"training step in {name} (reference: float32, not compiled)",
                *(timing.milliseconds for timing in timings),
                target=1.0,
                faster=True,
                notes=[_speed(name, step, timings[0].milliseconds, work, device)],
            )
        )
    return rows


def _in_bfloat16(step: Callable[[], Tensor], device: torch.device) -> Tensor:
    # The gradients are computed in the types of the forward pass.
    with torch.autocast(device.type, torch.bfloat16):
        return step()


def _speed(
    name: str, step: Callable[[], Tensor], milliseconds: float, work: Work, device: torch.device
) -> str:
    """What a step achieves, as a note."""
    seconds = milliseconds / 1000
    tokens = sum(max(1, frames // FRAMES_PER_TOKEN) for frames in work.frames)
    return (
        f"{name}: {sum(work.frames) / seconds:.0f} frames and {tokens / seconds:.0f} tokens a "
        f"second; {100 * other_share(profiled(step, device)):.0f} % of the computing time goes "
        "neither into matrix products nor into convolutions"
    )


def profiled(step: Callable[[], Tensor], device: torch.device) -> list[tuple[str, float]]:
    """Profiles a step.

    Args:
        step: What is to be profiled.
        device: Where it computes.

    Returns:
        Names and microseconds of kernels, or of operators on a CPU, without what they call.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    with profile(activities=activities, acc_events=True) as recorded:
        step()
        if on_gpu:
            torch.cuda.synchronize(device)
    return [
        (event.key, event.self_device_time_total if on_gpu else event.self_cpu_time_total)
        for event in recorded.key_averages()
    ]


def other_share(times: Iterable[tuple[str, float]]) -> float:
    """Share of the time that goes neither into matrix products nor into convolutions.

    Args:
        times: Names of kernels or operators, and their times; attention's products count too.

    Returns:
        Share in [0, 1].
    """
    times = list(times)
    matrices = sum(
        time for name, time in times if MATRIX_WORK.search(name) and not NO_MATRIX_WORK.search(name)
    )
    return 1 - matrices / sum(time for _, time in times)


def _content(work: Work) -> str:
    return f"{len(work.frames)} utterances, {sum(work.frames)} frames in all"


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = ArgumentParser(description="Measure what padding costs in a training step.")
    parser.add_argument(
        "--device",
        choices=list(WORK),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to compute (default: %(default)s)",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="time bfloat16 and torch.compile on a CPU too, which takes minutes",
    )
    args = parser.parse_args(argv)
    device, work = torch.device(args.device), WORK[args.device]
    where = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(f"torch {torch.__version__}, {where}, {torch.get_num_threads()} CPU threads, float32\n")
    print("| what | time (ms) | reference (ms) | ratio | target |")
    print("|---|---|---|---|---|", flush=True)
    notes = []
    for timer in (time_ragged_step, time_video_resnet):
        row = timer(work, device)
        print(row, flush=True)
        notes += row.notes
    if device.type == "cuda" or args.compile:
        for row in time_settings(work, device):
            print(row, flush=True)
            notes += row.notes
    print("", *(f"- {note}" for note in notes), sep="\n")


if __name__ == "__main__":
    main()
