"""The recogniser with pretrained decoders: vocabulary, losses, and Whisper at the start."""

import pytest
import torch
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

from datamodule.pretrained_text_transform import llama_text_transform, whisper_text_transform
from espnet.nets import batch_beam_search
from espnet.nets.pytorch_backend.e2e_asr_conformer import E2E
from espnet.nets.search import build_beam_search
from espnet.nets.search_options import SearchOptions
from tests.tables import PRETRAINED

WIDTH = 64  # of the tiny checkpoints
FRAMES = [7, 5]
SIZES = {
    "adim": 16,
    "aheads": 2,
    "eunits": 32,
    "elayers": 1,
    "dunits": 32,
    "dlayers": 1,
    "cnn_module_kernel": 7,
    "video_width": 2,
    "audio_width": 2,
    "dropout_rate": 0.0,
}
DECODERS = {
    "llama": {"decoder": "llama", "llama_cross_every": 2},
    "llama_prefix": {"decoder": "llama", "llama_conditioning": "prefix"},
    "whisper": {"decoder": "whisper"},
}
# The rest follows from the checkpoints.
WHISPER_ALONE = {"audio_encoder": "whisper", "elayers": None, "adim": None}


@pytest.fixture(scope="module")
def transforms(tiny_checkpoints):
    """The vocabulary of each decoder."""
    llama, whisper = str(tiny_checkpoints / "llama"), str(tiny_checkpoints / "whisper")
    options = {"text_case": "lower"}
    return {
        "llama": llama_text_transform(llama, prompt=None, **options),
        "llama_prefix": llama_text_transform(llama, prompt="write:", **options),
        "whisper": whisper_text_transform(whisper, language=None, task="transcribe", **options),
    }


@pytest.fixture
def make(tiny_checkpoints, transforms):
    """Makes a model with a pretrained decoder, of random streams or tiny checkpoints."""

    def model(decoder, modality="audiovisual", **options):
        vocabulary = transforms[decoder]
        options = {**SIZES, **DECODERS[decoder], **options}
        for word in ("vision_encoder", "audio_encoder", "decoder"):
            if options.get(word) in PRETRAINED:
                options[f"{word}_name"] = str(tiny_checkpoints / options[word])
        torch.manual_seed(0)
        return E2E.from_keywords(
            vocabulary.odim,
            modality,
            sos=vocabulary.sos,
            eos=vocabulary.eos,
            prompt=vocabulary.prompt,
            special_tokens=vocabulary.special_tokens,
            **options,
        )

    return model


def batch(transform, texts=("bin blue at f two now", "lay red by g"), seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = {
        "video": torch.randn(2, max(FRAMES), 1, 24, 24, generator=generator),
        "audio": torch.randn(2, 640 * max(FRAMES), 1, generator=generator),
    }
    lengths = {"video": torch.tensor(FRAMES), "audio": 640 * torch.tensor(FRAMES)}
    targets = [transform.tokenize(text) for text in texts]
    return x, lengths, torch.nn.utils.rnn.pad_sequence(targets, True, padding_value=-1)


@pytest.mark.parametrize(
    ("decoder", "options"),
    [*((decoder, {}) for decoder in DECODERS), ("llama_prefix", {"llama_prefix_ctc": True})],
)
@pytest.mark.parametrize("texts", [("bin blue", ""), ("", "")])
def test_silence_can_be_trained(make, transforms, decoder, options, texts):
    model = make(decoder, **options).eval()
    x, lengths, targets = batch(transforms[decoder], texts)
    together = torch.stack(model(x, lengths, targets)[:3])
    alone = []
    for row, frames in enumerate(FRAMES):
        one = {"video": x["video"][[row], :frames], "audio": x["audio"][[row], : 640 * frames]}
        target = targets[[row]][:, targets[row] != -1]
        losses = model(one, {s: v[[row]] for s, v in lengths.items()}, target)
        alone.append(torch.stack(losses[:3]))
    assert together.isfinite().all()
    same = [2] if options else [0, 1, 2]  # CTC of a prefix compares the tokens of the whole batch.
    expected = torch.stack(alone).mean(dim=0)
    torch.testing.assert_close(together[same], expected[same], atol=1e-4, rtol=1e-4)
    model.train()
    model(x, lengths, targets)[0].backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("freeze", [True, False])
def test_a_step_trains_what_is_not_frozen_and_padding_changes_nothing(
    make, transforms, decoder, freeze
):
    model = make(decoder, freeze_decoder=freeze)
    x, lengths, targets = batch(transforms[decoder])
    model.train()
    loss, loss_ctc, loss_att, accuracy = model(x, lengths, targets)
    assert loss.isfinite()
    assert 0 <= accuracy <= 1
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert all(name.startswith("decoder.") for name in frozen)
    assert bool(frozen) == freeze
    model.eval()
    together = torch.stack(model(x, lengths, targets)[:3])
    alone = []
    for row, frames in enumerate(FRAMES):
        one = {"video": x["video"][[row], :frames], "audio": x["audio"][[row], : 640 * frames]}
        target = targets[[row]][:, targets[row] != -1]
        losses = model(one, {s: v[[row]] for s, v in lengths.items()}, target)
        alone.append(torch.stack(losses[:3]))
    torch.testing.assert_close(together, torch.stack(alone).mean(dim=0), atol=1e-4, rtol=1e-4)


def test_there_is_a_ctc_layer_where_ctc_has_a_share(make, transforms):
    assert make("whisper", ctc_weight=0.3).ctc is not None
    assert make("whisper").ctc is None
    model = make("llama")
    assert model.ctc is None
    assert not any(name.startswith("ctc.") for name in model.state_dict())
    loss, loss_ctc, loss_att, _ = model(*batch(transforms["llama"]))
    assert loss_ctc == 0
    assert loss == loss_att
    with pytest.raises(ValueError, match="--ctc-decode-weight 0.3, but a model of --ctc-weight 0"):
        build_beam_search(
            model, SearchOptions(ctc_decode_weight=0.3), transforms["llama"].token_list
        )
    assert make("llama", ctc_weight=0.2).ctc is not None


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_loss_is_that_of_the_checkpoints_own_vocabulary(make, transforms, decoder):
    model = make(decoder, label_smoothing=0.0, ctc_weight=0.0).eval()
    x, lengths, targets = batch(transforms[decoder])
    memory, frames, _ = model.encode(x, lengths)
    total = 0.0
    for row, target in enumerate(targets):
        words = target[target != -1]
        inputs = torch.cat([torch.tensor([model.sos]), words])[None]
        logits = model.decoder(inputs, memory[[row], : frames[row]], frames[[row]])[0]
        wanted = torch.cat([words, torch.tensor([model.eos])]) - 1
        total += torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
    torch.testing.assert_close(model(x, lengths, targets)[2], total / 2)


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_search_writes_text_and_nothing_else(make, transforms, decoder):
    model = make(decoder, ctc_weight=0.3).eval()
    transform = transforms[decoder]
    x, lengths, _ = batch(transform)
    options = SearchOptions(beam_size=3, ctc_decode_weight=0.3, max_dec_tokens=4)
    search = build_beam_search(model, options, transform.token_list)
    for hypotheses in search(*model.encode(x, lengths)):
        tokens = hypotheses[0].yseq[1:].tolist()
        assert len([token for token in tokens if token != model.eos]) <= 4
        assert 0 not in tokens
        if decoder == "whisper":
            assert not {token - 1 for token in tokens} & set(transform.special_tokens)


@pytest.mark.parametrize("decoder", DECODERS)
def test_finished_utterances_may_be_searched_on_for_some_steps(
    make, transforms, decoder, monkeypatch
):
    """As on a GPU, where the search looks every few steps only; it finds the same."""
    model = make(decoder, ctc_weight=0.0).eval()
    transform = transforms[decoder]
    x, lengths, _ = batch(transform)
    memory, frames, _ = model.encode(x, lengths)
    found = []
    for interval in (1, 5):
        monkeypatch.setitem(batch_beam_search.STOP_TEST_INTERVAL, "cpu", interval)
        search = build_beam_search(model, SearchOptions(beam_size=3), transform.token_list)
        found.append([hypotheses[0] for hypotheses in search(memory, frames)])
    for one, two in zip(*found, strict=True):
        assert torch.equal(one.yseq, two.yseq)
        assert one.score == pytest.approx(two.score)


def test_a_vocabulary_of_another_size_is_refused(tiny_checkpoints):
    options = {**SIZES, "decoder": "whisper", "decoder_name": str(tiny_checkpoints / "whisper")}
    with pytest.raises(ValueError, match="the vocabulary has 300 ids, but --decoder-name .* needs"):
        E2E.from_keywords(300, "audio", sos=5, eos=2, prompt=(4,), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder": "gpt"}, "--decoder gpt is unknown: choose one of transformer, llama, whisper"),
        ({"decoder_name": "x/y"}, "--decoder-name x/y, but transformer loads no checkpoint"),
        ({"freeze_decoder": True}, "--freeze-decoder needs --decoder llama or whisper"),
        ({"decoder": "llama", "decoder_name": "WHISPER"}, "is a checkpoint of whisper, one of lla"),
        ({"decoder": "whisper", "decoder_name": "LLAMA"}, "is a checkpoint of llama, one of whis"),
        (
            {"decoder": "whisper", "whisper_gated_video": True},
            "--whisper-gated-video needs a model of video and audio, got one of audio alone",
        ),
        (
            {"decoder": "llama", "llama_conditioning": "both"},
            "--llama-conditioning both is unknown",
        ),
        (
            {"decoder": "llama", "freeze_decoder": False, "decoder_dtype": "bfloat16"},
            "--decoder-dtype bfloat16 needs a frozen decoder",
        ),
    ],
)
def test_wrong_combinations(tiny_checkpoints, options, message):
    name = options.get("decoder_name", "")
    if name.isupper():
        options = {**options, "decoder_name": str(tiny_checkpoints / name.lower())}
    with pytest.raises(ValueError, match=message):
        E2E.from_keywords(30, "audio", **SIZES, **options)


VARIANTS = [
    ("audio", {}),
    ("audiovisual", {}),
    ("audiovisual", {"vision_encoder": "clip"}),
    ("audiovisual", {"whisper_gated_video": True}),
]


@pytest.fixture(scope="module")
def whisper(tiny_checkpoints):
    return WhisperForConditionalGeneration.from_pretrained(tiny_checkpoints / "whisper").eval()


@pytest.fixture(scope="module")
def utterance():
    """30 s, so that transformers pads nothing; silent at the end, where it would mirror."""
    generator = torch.Generator().manual_seed(0)
    audio = 0.1 * torch.randn(480000, generator=generator)
    audio[-400:] = 0
    video = torch.randn(1, 750, 1, 16, 16, generator=generator)
    mel = WhisperFeatureExtractor()(audio.numpy(), sampling_rate=16000, return_tensors="pt")
    return audio, video, mel.input_features


def encode(model, utterance):
    audio, video, _ = utterance
    x = {"audio": audio.view(1, -1, 1), "video": video}
    lengths = {"audio": torch.tensor([480000]), "video": torch.tensor([750])}
    x = {stream: x[stream] for stream in model.streams}
    return model.encode(x, {stream: lengths[stream] for stream in model.streams})


@torch.no_grad()
@pytest.mark.parametrize(("modality", "options"), VARIANTS)
def test_whisper_at_the_start_teacher_forced(
    make, whisper, utterance, transforms, modality, options
):
    model = make("whisper", modality, **WHISPER_ALONE, **options).eval()
    transform = transforms["whisper"]
    text = transform.tokenize("bin blue at f two now")
    encoded = encode(model, utterance)
    tokens = torch.cat([torch.tensor([model.sos]), text])[None]
    ours = model.decoder(tokens, encoded.memory, encoded.lengths, **encoded.beside)
    ids = torch.cat([torch.tensor(transform.prompt), text - 1])[None]
    theirs = whisper(input_features=utterance[2], decoder_input_ids=ids).logits
    # Features differ by the rounding of the log-mel filters.
    expected = theirs[:, len(transform.prompt) - 1 :]
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("modality", "options"), VARIANTS)
def test_whisper_at_the_start_greedily(make, whisper, utterance, transforms, modality, options):
    model = make("whisper", modality, **WHISPER_ALONE, **options).eval()
    transform = transforms["whisper"]
    options = SearchOptions(beam_size=1, max_dec_tokens=9, stop_repeats=False)
    search = build_beam_search(model, options, transform.token_list)
    ((hypothesis, *_),) = search(*encode(model, utterance))
    ours = [token - 1 for token in hypothesis.yseq[1:].tolist() if token != model.eos]
    config = whisper.generation_config
    theirs = whisper.generate(
        input_features=utterance[2],
        decoder_input_ids=torch.tensor([transform.prompt]),
        do_sample=False,
        num_beams=1,
        max_new_tokens=9,
        suppress_tokens=sorted({*config.suppress_tokens, *transform.special_tokens}),
        begin_suppress_tokens=[t for t in config.begin_suppress_tokens if t != model.eos - 1],
    )[0].tolist()
    theirs = [token for token in theirs if token != model.eos - 1]
    prompt = list(transform.prompt)
    assert ours == (theirs[len(prompt) :] if theirs[: len(prompt)] == prompt else theirs)
    assert len(ours) > 1


def two_seconds():
    """Audio (1, S, 1) and video of less than 30 s, and their lengths."""
    generator = torch.Generator().manual_seed(5)
    x = {
        "audio": 0.1 * torch.randn(1, 32_000, 1, generator=generator),
        "video": torch.randn(1, 50, 1, 16, 16, generator=generator),
    }
    return x, {"audio": torch.tensor([32_000]), "video": torch.tensor([50])}


@torch.no_grad()
@pytest.mark.parametrize(("modality", "options"), VARIANTS[:3])
def test_whisper_at_the_start_on_a_short_utterance(make, whisper, transforms, modality, options):
    """With the silence that it was trained with, up to 30 s."""
    model = make("whisper", modality, whisper_margin=30.0, **WHISPER_ALONE, **options).eval()
    x, lengths = two_seconds()
    x, lengths = ({s: of[s] for s in model.streams} for of in (x, lengths))
    transform = transforms["whisper"]
    tokens = torch.tensor([model.sos, *transform.tokenize("bin blue at f two now")])[None]
    encoded = model.encode(x, lengths)
    assert encoded.lengths.tolist() == [1500]
    extractor = WhisperFeatureExtractor()
    mel = extractor(x["audio"][0, :, 0].numpy(), sampling_rate=16000, return_tensors="pt")
    ids = torch.cat([torch.tensor([transform.prompt[:-1]]), tokens - 1], dim=1)
    theirs = whisper(input_features=mel.input_features, decoder_input_ids=ids).logits
    expected = theirs[:, len(transform.prompt) - 1 :]
    ours = model.decoder(tokens, encoded.memory, encoded.lengths, **encoded.beside)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("decoder", "options", "frames"),
    [
        ("whisper", WHISPER_ALONE, 100 + 2 * 50),
        ("whisper", {**WHISPER_ALONE, "frame_rate": 25}, 50 + 2 * 25),
        ("whisper", {**WHISPER_ALONE, "whisper_margin": 0.5}, 100 + 25),
        ("whisper", {**WHISPER_ALONE, "whisper_pad_30s": True}, 1500),
        ("whisper", {"audio_encoder": "whisper", "elayers": 1}, 100 + 2 * 50),
        ("whisper", {"audio_encoder": "wavlm"}, 50),
        ("llama", {"audio_encoder": "whisper"}, 50),
        ("llama", {"audio_encoder": "whisper", "whisper_margin": 1.0}, 75),
    ],
)
@pytest.mark.parametrize("modality", ["audio", "audiovisual"])
@torch.no_grad()
def test_what_whispers_decoder_attends_to_ends_with_silence(
    make, decoder, options, frames, modality
):
    model = make(decoder, modality, **options).eval()
    x, lengths = two_seconds()
    x, lengths = ({s: of[s] for s in model.streams} for of in (x, lengths))
    memory, memory_lengths, _ = model.encode(x, lengths)
    assert memory.size(1) == frames
    assert memory_lengths.tolist() == [frames]


@torch.no_grad()
def test_silence_stands_after_each_utterance_of_a_batch(make, transforms):
    model = make("whisper", **WHISPER_ALONE, modality_dropout=(0.3, 0.3)).eval()
    torch.nn.init.normal_(model.missing_audio)
    torch.nn.init.normal_(model.proj_encoder.weight, std=0.1)
    x, lengths, _ = batch(transforms["whisper"])
    memory, memory_lengths, _ = model.encode(x, lengths)
    assert memory_lengths.tolist() == [2 * frames + 100 for frames in FRAMES]
    for row, frames in enumerate(FRAMES):
        one = {"video": x["video"][[row], :frames], "audio": x["audio"][[row], : 640 * frames]}
        alone, length, _ = model.encode(one, {s: v[[row]] for s, v in lengths.items()})
        torch.testing.assert_close(memory[[row], : int(length)], alone)
    # Without its audio, an utterance is as long.
    _, without, _ = model.encode({"video": x["video"]}, {"video": lengths["video"]})
    assert without.tolist() == memory_lengths.tolist()


@torch.no_grad()
def test_gated_video_has_a_length_of_its_own(make, transforms):
    """Neither the silence after the audio nor what pads the video is seen in it."""
    options = {**WHISPER_ALONE, "whisper_gated_video": True, "ctc_weight": 0.3}
    model = make("whisper", "audiovisual", **options).eval()
    for gated in model.decoder.video_attention:
        for name, parameter in gated.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(0.5)
    x, lengths, targets = batch(transforms["whisper"])
    lengths["video"] = lengths["video"] - torch.tensor([0, 1])  # A frame may be missing.
    encoded = model.encode(x, lengths)
    assert encoded.lengths.tolist() == [2 * frames + 100 for frames in FRAMES]
    assert encoded.video.lengths.tolist() == [2 * FRAMES[0], 2 * FRAMES[1] - 2]
    assert encoded.video.features.size(1) == 2 * max(FRAMES)
    tokens = torch.randint(3, 30, (2, 4), generator=torch.Generator().manual_seed(1))
    together = model.decoder(tokens, encoded.memory, encoded.lengths, encoded.video)
    for row, frames in enumerate(FRAMES):
        audio = x["audio"][[row], : 640 * frames]
        video = x["video"][[row], : lengths["video"][row]]
        alone = model.encode(
            {"video": video, "audio": audio}, {s: v[[row]] for s, v in lengths.items()}
        )
        logits = model.decoder(tokens[[row]], alone.memory, alone.lengths, alone.video)
        torch.testing.assert_close(together[[row]], logits)
    spoilt = encoded.video.features.clone()
    spoilt[1, encoded.video.lengths[1] :] = 9.0
    video = encoded.video._replace(features=spoilt)
    again = model.decoder(tokens, encoded.memory, encoded.lengths, video)
    torch.testing.assert_close(again, together)
    spoilt[1, 0] = 9.0
    again = model.decoder(tokens, encoded.memory, encoded.lengths, video)
    assert (again[1] - together[1]).abs().max() > 1e-3


def test_ctc_of_the_prefix_takes_the_place_of_a_ctc_layer(make, transforms):
    model = make("llama_prefix", llama_prefix_ctc=True, llama_downsample=1)
    assert model.ctc is None
    assert model.ctc_weight == 0.2
    x, lengths, targets = batch(transforms["llama_prefix"], ("at f", "by g"))
    loss, loss_ctc, loss_att, _ = model(x, lengths, targets)
    torch.testing.assert_close(loss, 0.2 * loss_ctc + 0.8 * loss_att)
    encoded = model.eval().encode(x, lengths)
    expected = model.decoder.prefix_loss(encoded.memory, encoded.lengths, targets)
    torch.testing.assert_close(model(x, lengths, targets)[1], expected)
    prefix, expected = model.decoder.memory_prefix(encoded.memory, encoded.lengths)
    assert torch.equal(model.ctc_lengths(lengths), expected)
    assert model.ctc_lengths(lengths).max() == prefix.size(1)
    model.train().ctc_alone = True
    model.decoder.features = None  # It is not asked.
    loss, loss_ctc, loss_att, accuracy = model(x, lengths, targets)
    assert loss == loss_ctc > 0
    assert loss_att == accuracy == 0
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="--llama-prefix-ctc contradicts --ctc-weight 0"):
        make("llama_prefix", llama_prefix_ctc=True, ctc_weight=0.0)
    with pytest.raises(ValueError, match="--ctc-decode-weight 0.1, but a model of --llama-prefix-"):
        SearchOptions(ctc_decode_weight=0.1).resolved(model.options)
    assert SearchOptions().resolved(model.options).ctc_decode_weight == 0.0
