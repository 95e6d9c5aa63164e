"""The recogniser: front-ends, fusion, Conformer, CTC and decoder, and what builds them."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet.nets.decoders import DECODERS, DecoderOptions, Vocabulary
from espnet.nets.encoders import AUDIO_ENCODERS, VISION_ENCODERS
from espnet.nets.model_options import FUSIONS, ModelOptions
from espnet.nets.pytorch_backend.ctc import CTC
from espnet.nets.pytorch_backend.decoder.interface import DecoderInterface
from espnet.nets.pytorch_backend.decoder.llama_decoder import LLaMADecoder
from espnet.nets.pytorch_backend.decoder.transformer_decoder import TransformerDecoder
from espnet.nets.pytorch_backend.decoder.whisper_decoder import WhisperDecoder
from espnet.nets.pytorch_backend.encoded import Encoded, Video, fit_length, join_video
from espnet.nets.pytorch_backend.encoder.conformer_encoder import ConformerEncoder
from espnet.nets.pytorch_backend.frontend.clip_encoder import CLIPEncoder
from espnet.nets.pytorch_backend.frontend.fbank import FilterBank
from espnet.nets.pytorch_backend.frontend.interface import FrontendInterface
from espnet.nets.pytorch_backend.frontend.resnet import Conv3dResNet
from espnet.nets.pytorch_backend.frontend.resnet1d import Conv1dResNet
from espnet.nets.pytorch_backend.frontend.vit_encoder import ViTEncoder
from espnet.nets.pytorch_backend.frontend.wavlm_encoder import WavLMEncoder
from espnet.nets.pytorch_backend.frontend.whisper_encoder import WhisperEncoder
from espnet.nets.pytorch_backend.fusion.concat import ConcatFusion
from espnet.nets.pytorch_backend.fusion.interface import FusionInterface
from espnet.nets.pytorch_backend.nets_utils import FreezableModule, has_bfloat16, send
from espnet.nets.pytorch_backend.qlora_utils import adapt_parts
from espnet.nets.pytorch_backend.resampling import resample, resampled_lengths, resampled_width
from espnet.nets.pytorch_backend.smoothed_loss import smoothed_loss
from espnet.option_tree import from_flat, names

MAX_LENGTH_DIFFERENCE = 2  # frames by which the streams of one utterance may differ


def build_video_frontend(options: ModelOptions, *, quantize: bool = False) -> FrontendInterface:
    """Builds the front-end of the video stream.

    Args:
        options: Resolved.
        quantize: Whether a checkpoint's linear layers go into 4 bits while they are loaded.

    Returns:
        The front-end; its weights are those of a checkpoint if it is pretrained.

    Raises:
        ValueError: If the name is unknown, or the checkpoint cannot be loaded.
    """
    encoders = options.encoders
    name = encoders.vision_encoder
    of_images = {
        **_of_checkpoint(options, freeze=encoders.freeze_vision_encoder, quantize=quantize),
        "pooling": encoders.vision_pooling,
        "image_size": encoders.vision_image_size,
        "chunk_frames": encoders.vision_chunk_frames,
    }
    if name == "resnet":
        frontend = Conv3dResNet(width=encoders.video_width)
        return frontend.requires_grad_(not encoders.freeze_vision_encoder)
    elif name == "vit":
        return ViTEncoder(encoders.vision_encoder_name, **of_images)
    elif name == "clip":
        return CLIPEncoder(encoders.vision_encoder_name, **of_images)
    raise ValueError(f"video front-end {name!r} is unknown: choose {', '.join(VISION_ENCODERS)}")


def build_audio_frontend(options: ModelOptions, *, quantize: bool = False) -> FrontendInterface:
    """Builds the front-end of the audio stream; as for `build_video_frontend`."""
    encoders = options.encoders
    name = encoders.audio_encoder
    of_waves = _of_checkpoint(options, freeze=encoders.freeze_audio_encoder, quantize=quantize)
    if name == "resnet1d":
        frontend = Conv1dResNet(width=encoders.audio_width)
        return frontend.requires_grad_(not encoders.freeze_audio_encoder)
    elif name == "fbank":
        frontend = FilterBank(width=encoders.audio_width)
        return frontend.requires_grad_(not encoders.freeze_audio_encoder)
    elif name == "whisper":
        margin = encoders.whisper_margin
        return WhisperEncoder(encoders.audio_encoder_name, margin=margin, **of_waves)
    elif name == "wavlm":
        return WavLMEncoder(encoders.audio_encoder_name, **of_waves)
    raise ValueError(f"audio front-end {name!r} is unknown: choose {', '.join(AUDIO_ENCODERS)}")


def _of_checkpoint(options: ModelOptions, *, freeze: bool, quantize: bool) -> dict[str, Any]:
    """What every front-end with a checkpoint takes."""
    return {
        "freeze": freeze,
        "unfreeze_last_layers": options.encoders.unfreeze_last_layers if freeze else 0,
        "encoder_layer": options.encoders.encoder_layer,
        "gradient_checkpointing": options.gradient_checkpointing,
        "quantize": quantize,
    }


def build_fusion(options: ModelOptions, widths: Mapping[str, int], adim: int) -> FusionInterface:
    """Builds what makes one sequence of features out of those of the streams.

    Args:
        options: Resolved.
        widths: Features of each stream at the frame rate, in their order.
        adim: Features D of what it gives.

    Returns:
        A module that takes features by stream, (B, T, width) each, and lengths, (B,).

    Raises:
        ValueError: If the name is unknown.
    """
    name = options.fusion
    if name == "concat":
        return ConcatFusion(widths, adim)
    raise ValueError(f"fusion {name!r} is unknown: choose {', '.join(FUSIONS)}")


def build_decoder(
    options: ModelOptions,
    vocabulary: Vocabulary,
    *,
    memory_dim: int,
    video_dim: int = 0,
    quantize: bool = False,
) -> DecoderInterface:
    """Builds the decoder.

    Args:
        options: Resolved.
        vocabulary: What it speaks.
        memory_dim: Size of the encoder's output.
        video_dim: Features of the video that follow those of the memory; 0 for none.
        quantize: As for `build_video_frontend`.

    Returns:
        The decoder; its weights are those of a checkpoint if it is pretrained.

    Raises:
        ValueError: If the name is unknown, or the checkpoint cannot be loaded.
    """
    decoder = options.decoder
    name = decoder.decoder
    pretrained = {
        "memory_dim": memory_dim,
        "prompt": vocabulary.prompt,
        "eos": vocabulary.eos,
        "suppress": vocabulary.special_tokens,
        "freeze": decoder.freeze_decoder,
        "gradient_checkpointing": options.gradient_checkpointing,
        "dropout_rate": options.dropout_rate,
        "dtype": _decoder_dtype(decoder),
        "quantize": quantize,
    }
    if name == "transformer":
        return TransformerDecoder(
            odim=vocabulary.odim,
            attention_dim=memory_dim,
            attention_heads=options.aheads,
            linear_units=options.dunits,
            num_blocks=options.dlayers,
            dropout_rate=options.dropout_rate,
        )
    elif name == "llama":
        return LLaMADecoder(
            decoder.decoder_name,
            conditioning=decoder.llama_conditioning,
            cross_every=decoder.llama_cross_every,
            downsample=decoder.llama_downsample,
            prefix_ctc=decoder.llama_prefix_ctc,
            **pretrained,
        )
    elif name == "whisper":
        return WhisperDecoder(decoder.decoder_name, video_dim=video_dim, **pretrained)
    raise ValueError(f"decoder {name!r} is unknown: choose {', '.join(DECODERS)}")


def _decoder_dtype(options: DecoderOptions) -> torch.dtype:
    """Precision of a checkpoint's weights: less than float32 only where they are not trained."""
    automatic = options.decoder_dtype == "auto" and options.freeze_decoder and has_bfloat16()
    return torch.bfloat16 if automatic or options.decoder_dtype == "bfloat16" else torch.float32


class E2E(FreezableModule):
    """Audio, video or audio-visual recogniser trained with CTC and attention together.

    Source: Watanabe et al., Hybrid CTC/Attention Architecture, 2017; Ma et al., Auto-AVSR, ICASSP
    2023, whose state dicts load as they are.

    Without a Conformer, and with a pretrained audio encoder whose features at the frame rate have
    size `adim`, the fused features are the audio's at the start.

    Args:
        options: Resolved or not.
        vocabulary: V ids: blank (0), the tokens, and what begins and ends a text.
        ignore_id: Id that pads targets.

    Attributes:
        options: Resolved.
        ctc_alone: Whether training leaves out the decoder's loss for now.
        vocabulary: Fingerprint of its tokens, which checkpoints keep; None if they are not known.

    Raises:
        ValueError: If options contradict each other or do not fit the vocabulary, a checkpoint
            cannot be loaded, or a part cannot be adapted.
    """

    def __init__(self, options: ModelOptions, vocabulary: Vocabulary, ignore_id: int = -1) -> None:
        super().__init__()
        self.options = options = options.resolved()
        encoders, decoder, adaptation = options.encoders, options.decoder, options.adaptation
        in_4_bits = adaptation.qlora_parts if adaptation.use_qlora else ()
        self.odim, self.sos, self.eos = vocabulary.odim, vocabulary.sos, vocabulary.eos
        self.vocabulary = vocabulary.fingerprint
        self.streams = encoders.streams
        self.fused_streams = ("audio",) if decoder.whisper_gated_video else self.streams
        self.ctc_weight = options.ctc_weight
        self.ctc_alone = False
        self.ignore_id = ignore_id
        self.label_smoothing = options.label_smoothing
        self.modality_dropout = options.modality_dropout

        self.frame_rate = encoders.frame_rate
        # Frames of silence after an utterance, which Whisper's encoder adds.
        self.margin = round(encoders.whisper_margin * self.frame_rate)
        if "video" in self.streams:
            self.video_frontend = build_video_frontend(options, quantize="vision" in in_4_bits)
        if "audio" in self.streams:
            self.audio_frontend = build_audio_frontend(options, quantize="audio" in in_4_bits)
        widths = {stream: self._width(stream) for stream in self.streams}
        if any(options.modality_dropout):
            self.missing_video = nn.Parameter(torch.zeros(widths["video"]))
            self.missing_audio = nn.Parameter(torch.zeros(widths["audio"]))
        adim = options.adim or widths["audio"]
        self.proj_encoder = build_fusion(options, {s: widths[s] for s in self.fused_streams}, adim)
        self.encoder = None
        if options.elayers:
            self.encoder = ConformerEncoder(
                attention_dim=adim,
                attention_heads=options.aheads,
                linear_units=options.eunits,
                num_blocks=options.elayers,
                cnn_module_kernel=options.cnn_module_kernel,
                dropout_rate=options.dropout_rate,
            )
        elif (hears := encoders.choice("audio")) and hears.pretrained and widths["audio"] == adim:
            self.proj_encoder.pass_on_last()
        # Gated video reaches the decoder beside the memory, not in it.
        video_dim = widths["video"] if decoder.whisper_gated_video else 0
        self.decoder = build_decoder(
            options,
            vocabulary,
            memory_dim=adim,
            video_dim=video_dim,
            quantize="decoder" in in_4_bits,
        )
        if self.decoder.odim != self.odim:
            raise ValueError(
                f"the vocabulary has {self.odim} ids, but --decoder-name {decoder.decoder_name} "
                f"needs {self.decoder.odim}: take the tokenizer of this checkpoint"
            )
        self.ctc = None
        if options.has_ctc_layer:
            self.ctc = CTC(
                odim=self.odim,
                encoder_dim=adim + video_dim,
                dropout_rate=options.dropout_rate,
                ignore_id=ignore_id,
            )
        if adaptation.enabled:
            adapt_parts(
                {part: self._adaptable(part) for part in adaptation.qlora_parts}, adaptation
            )
        self.register_load_state_dict_pre_hook(_rename_on_load)
        self.train()  # but for what is frozen

    @classmethod
    def from_keywords(
        cls,
        odim: int,
        modality: str,
        ctc_weight: float | None = None,
        ignore_id: int = -1,
        *,
        sos: int | None = None,
        eos: int | None = None,
        prompt: tuple[int, ...] = (),
        special_tokens: tuple[int, ...] = (),
        **options: Any,
    ) -> "E2E":
        """Builds a model without a command line, with the first arguments of auto_avsr's `E2E`.

        Args:
            odim: Vocabulary size V.
            modality: `audio`, `video` or `audiovisual`.
            ctc_weight: CTC's share of the loss.
            ignore_id: Id that pads targets.
            sos: Id that begins a decoder's input; None: the same as `eos`.
            eos: Id that ends its output; None: V - 1.
            prompt: As in `Vocabulary`.
            special_tokens: As in `Vocabulary`.
            **options: Options of `ModelOptions` and its branches, by name.

        Returns:
            The model.

        Raises:
            TypeError: If there is no such option.
        """
        if unknown := options.keys() - names(ModelOptions):
            raise TypeError(f"E2E got unknown options {', '.join(sorted(unknown))}")
        eos = odim - 1 if eos is None else eos
        vocabulary = Vocabulary(
            odim=odim,
            sos=eos if sos is None else sos,
            eos=eos,
            prompt=prompt,
            special_tokens=special_tokens,
        )
        given = {**options, "modality": modality, "ctc_weight": ctc_weight}
        return cls(from_flat(ModelOptions, given), vocabulary, ignore_id)

    def forward(
        self,
        x: Tensor | Mapping[str, Tensor],
        lengths: Tensor | Mapping[str, Tensor],
        targets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | Encoded:
        """Encodes a batch, and computes the training loss if there are targets.

        Args:
            x: Video (B, T, 1, H, W) or audio (B, S, 1) of a model with one stream, or
                `{"video": ..., "audio": ...}`; after training with modality dropout, a stream may
                be absent.
            lengths: Frames and samples, (B,) each, in the same form, on the host.
            targets: Token ids, (B, U), padded with `ignore_id`; on the host, or they are waited
                for.

        Returns:
            The weighted loss, the CTC loss (0 without a CTC layer), the decoder's loss (means over
            the utterances) and the decoder's token accuracy; without targets, the encoded batch.

        Raises:
            ValueError: If a stream is absent that the model cannot do without, or the streams'
                lengths do not match.
        """
        if not isinstance(x, Mapping):
            x, lengths = {self.streams[0]: x}, {self.streams[0]: lengths}
        features, frames, video_frames = self._stream_features(x, lengths)
        memory = self.proj_encoder({s: features[s] for s in self.fused_streams}, frames)
        if self.encoder is not None:
            memory = self.encoder(memory, frames)
        gated = "video" in self.streams and "video" not in self.fused_streams
        video = Video(features["video"], video_frames) if gated else None
        encoded = Encoded(memory, frames, video)
        return encoded if targets is None else self.losses(encoded, targets)

    def encode(
        self, x: Tensor | Mapping[str, Tensor], lengths: Tensor | Mapping[str, Tensor]
    ) -> Encoded:
        """Encodes a batch; arguments and errors as for `forward`."""
        return self(x, lengths)

    def losses(self, encoded: Encoded, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Computes the losses of an encoded batch.

        Args:
            encoded: What `encode` gives.
            targets: Token ids, (B, U), padded with `ignore_id`; on the host, or they are waited
                for.

        Returns:
            As `forward`.
        """
        targets = targets.cpu()  # Shapes depend on them.
        memory, lengths, video = encoded
        loss_ctc = memory.new_zeros(())
        if self.ctc is not None:
            loss_ctc = self.ctc(join_video(memory, video), lengths, targets)
        elif self.ctc_weight:
            loss_ctc = self.decoder.prefix_loss(memory, lengths, targets)
        if self.ctc_alone and self.training:
            # Processes that train together wait for a gradient of every parameter.
            trained = (p for p in self.decoder.parameters() if p.requires_grad)
            nothing = sum((p.sum() * 0.0 for p in trained), memory.new_zeros(()))
            return loss_ctc + nothing, loss_ctc, nothing, memory.new_zeros(())
        loss_att, accuracy = self._decoder_loss(encoded, targets)
        loss = self.ctc_weight * loss_ctc + (1 - self.ctc_weight) * loss_att
        return loss, loss_ctc, loss_att, accuracy

    def output_lengths(self, lengths: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Frames of the memory, (B,), for lengths as `forward` takes them."""
        return self._frames_of(lengths)[0]

    def ctc_lengths(self, lengths: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Frames that CTC aligns with texts, (B,), for lengths as `forward` takes them.

        They are those of the memory, or the embeddings of its prefix where that has a CTC.
        """
        frames = self.output_lengths(lengths)
        return frames if self.ctc is not None else self.decoder.memory_prefix.lengths(frames)

    def _stream_features(
        self, x: Mapping[str, Tensor], lengths: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Features of all streams at the frame rate, (B, T, D) each; frames of memory and video."""
        missing = [stream for stream in self.streams if stream not in x]
        if missing and (not any(self.modality_dropout) or len(missing) == len(self.streams)):
            raise ValueError(
                f"input has streams {sorted(x)}, the model needs {list(self.streams)}: a model "
                "takes a single stream if it is trained with --modality-dropout"
            )
        frames, video_frames = self._frames_of(lengths)
        lost = self._draw_lost_streams(len(frames)) if self.training and not missing else {}
        features = {}
        for stream in self.streams:
            length = int((frames if stream in self.fused_streams else video_frames).max())
            if stream in x:
                features[stream] = self._encode_stream(
                    stream, x[stream], lengths[stream], lost.get(stream), length
                )
            else:
                vector = getattr(self, f"missing_{stream}")
                features[stream] = vector.expand(len(frames), length, -1)
        return features, frames, video_frames

    def _adaptable(self, part: str) -> nn.Module:
        """The module that adapters go into: what is new around a checkpoint is trained anyway."""
        name = {"vision": "video_frontend", "audio": "audio_frontend"}.get(part, part)
        module = getattr(self, name)
        return getattr(module, "backbone", module)

    def _frontend(self, stream: str) -> FrontendInterface:
        return self.video_frontend if stream == "video" else self.audio_frontend

    def _width(self, stream: str) -> int:
        """Size of the features of a stream at the frame rate."""
        frontend = self._frontend(stream)
        return resampled_width(frontend.output_dim, frontend.frame_rate, self.frame_rate)

    def _features(self, stream: str, x: Tensor, lengths: Tensor) -> Tensor:
        """Features of a stream at the frame rate, (B, T, D)."""
        frontend = self._frontend(stream)
        return resample(frontend(x, lengths)[0], frontend.frame_rate, self.frame_rate)

    def _frames(self, stream: str, lengths: Tensor, *, margin: bool = False) -> Tensor:
        """Frames at the frame rate of a stream, (B,), with or without the silence after it."""
        frontend = self._frontend(stream)
        count = frontend.output_lengths if margin else frontend.speech_lengths
        return resampled_lengths(count(lengths), frontend.frame_rate, self.frame_rate)

    def _frames_of(self, lengths: Tensor | Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Frames of the memory and of video beside it, (B,) each.

        The memory has those of the first stream that is fused, and the silence after the audio,
        also where the audio itself is absent. The streams may differ a bit.

        Raises:
            ValueError: If they differ by more than `MAX_LENGTH_DIFFERENCE`.
        """
        if not isinstance(lengths, Mapping):
            lengths = {self.streams[0]: lengths}
        streams = [stream for stream in self.streams if stream in lengths]
        speech = {stream: self._frames(stream, lengths[stream]) for stream in streams}
        first, *others = streams
        for stream in others:
            difference = (speech[stream] - speech[first]).abs()
            if difference.max() > MAX_LENGTH_DIFFERENCE:
                row = int(difference.argmax())
                raise ValueError(
                    f"utterance {row} of the batch has {int(speech[first][row])} frames of {first} "
                    f"and {int(speech[stream][row])} of {stream}, at most {MAX_LENGTH_DIFFERENCE} "
                    "may lie between them: they do not belong together"
                )
        fused = next((s for s in self.fused_streams if s in speech), first)
        memory = speech[fused] + self.margin
        if "audio" in lengths:  # Near 30 s there is room for less silence.
            silence = self._frames("audio", lengths["audio"], margin=True) - speech["audio"]
            memory = speech[fused] + silence
        return memory, speech.get("video", speech[first])

    def _encode_stream(
        self, stream: str, x: Tensor, lengths: Tensor, lost: Tensor | None, length: int
    ) -> Tensor:
        """Features of a stream, (B, length, D); utterances that lost it, (B,), get its vector."""
        if lost is None:
            return fit_length(self._features(stream, x, lengths), length)
        # Lost utterances save their work. One is always encoded, and the vector is always used:
        # processes that train together wait for a gradient of every parameter.
        rows = (~lost).nonzero().flatten() if not lost.all() else torch.zeros(1, dtype=torch.int64)
        kept_lengths, rows = lengths[rows], send(rows, x.device)
        kept = fit_length(self._features(stream, x[rows], kept_lengths), length)
        vector = getattr(self, f"missing_{stream}").to(kept.dtype)
        features = vector.repeat(len(x), length, 1).index_copy(0, rows, kept)
        return torch.where(send(lost, x.device)[:, None, None], vector, features)

    def _draw_lost_streams(self, batch_size: int) -> dict[str, Tensor]:
        """Which utterances lose a stream in this step, (B,) bool for each stream."""
        lose_audio, lose_video = self.modality_dropout
        if not any(self.modality_dropout):
            return {}
        draw = torch.rand(batch_size)
        return {
            "audio": draw < lose_audio,
            "video": (draw >= lose_audio) & (draw < lose_audio + lose_video),
        }

    def _decoder_loss(self, encoded: Encoded, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Label-smoothed cross-entropy, summed over tokens, averaged over utterances; accuracy."""
        real = targets != self.ignore_id
        lengths = real.sum(dim=1, keepdim=True)
        sos = targets.new_full((len(targets), 1), self.sos)
        inputs = torch.cat([sos, targets.masked_fill(~real, self.eos)], dim=1)  # (B, U + 1)
        outputs = F.pad(targets, (0, 1), value=self.ignore_id).scatter(1, lengths, self.eos)
        first = self.decoder.first_token
        loss, correct = smoothed_loss(
            self.decoder.logits,
            self.decoder.features(
                send(inputs, encoded.memory.device),
                encoded.memory,
                encoded.lengths,
                **encoded.beside,
            ),
            (outputs - first).masked_fill(outputs == self.ignore_id, self.ignore_id),
            vocabulary=self.odim - first,
            smoothing=self.label_smoothing,
            ignore_id=self.ignore_id,
        )
        return loss / len(targets), correct / int((outputs != self.ignore_id).sum())


def rename_single_frontend(state_dict: dict[str, Any], prefix: str = "") -> None:
    """Gives the one front-end of an auto_avsr state dict the name of its stream here, in place.

    Args:
        state_dict: Weights by name.
        prefix: What precedes the model's own names.
    """
    old = f"{prefix}frontend."
    is_video = f"{old}frontend3D.0.weight" in state_dict
    new = f"{prefix}{'video' if is_video else 'audio'}_frontend."
    for key in [key for key in state_dict if key.startswith(old)]:
        state_dict[new + key.removeprefix(old)] = state_dict.pop(key)


def _rename_on_load(
    module: nn.Module,  # noqa: ARG001
    state_dict: dict[str, Any],
    prefix: str,
    *_: Any,
) -> None:
    rename_single_frontend(state_dict, prefix)
