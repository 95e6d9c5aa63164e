import json

import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from espnet.nets.batch_beam_search import BatchBeamSearch
from espnet.nets.pytorch_backend.decoder.whisper_decoder import WhisperDecoder
from espnet.nets.pytorch_backend.encoded import Video

DIM, VOCABULARY, POSITIONS, FRAMES, VIDEO = 32, 60, 24, 20, 6
EOS, PROMPT = 1, (2, 3, 4, 5)  # the tokenizer's ids
SUPPRESSED, SUPPRESSED_AT_FIRST = [6, 7, 40], [8, 41]
BEAM = 3
MAX_TOKENS = POSITIONS - len(PROMPT)


def make_whisper(folder, seed=0, *, suppress=SUPPRESSED, begin=SUPPRESSED_AT_FIRST):
    """A checkpoint whose texts are varied and end now and then; no bias or norm is trivial."""
    config = WhisperConfig(
        d_model=DIM,
        encoder_layers=1,
        encoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=64,
        num_mel_bins=8,
        vocab_size=VOCABULARY,
        max_target_positions=POSITIONS,
        max_source_positions=FRAMES,
        pad_token_id=EOS,
        bos_token_id=EOS,
        eos_token_id=EOS,
        decoder_start_token_id=PROMPT[0],
    )
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    decoder = model.model.decoder
    decoder.embed_positions.weight.data *= 6.0
    for layer in decoder.layers:
        layer.encoder_attn.out_proj.weight.data *= 3.0
    decoder.layer_norm.bias.data += 0.5 * decoder.embed_tokens.weight[EOS]
    model.generation_config.suppress_tokens = suppress
    model.generation_config.begin_suppress_tokens = begin
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("whisper")


@pytest.fixture(scope="module")
def whisper(folder):
    return make_whisper(folder)


@pytest.fixture
def make_decoder(folder, whisper):  # noqa: ARG001 - the folder is empty before
    """Builds a decoder in eval mode; gates to video are open and its norms not trivial."""

    def make(*, gate=0.5, **options):
        torch.manual_seed(1)
        options = {"memory_dim": DIM, "prompt": PROMPT, "eos": EOS + 1, **options}
        decoder = WhisperDecoder(str(folder), **options).eval()
        for name, parameter in decoder.video_attention.named_parameters():
            if name.endswith("gate"):
                parameter.data.fill_(gate)
            else:
                parameter.data += 0.1 * torch.randn_like(parameter)
        return decoder

    return make


def make_video(video_dim, frames, lengths):
    """Video of some utterances, with numbers in the padding that nobody may see."""
    if not video_dim:
        return None
    features = torch.randn(len(lengths), frames, video_dim)
    for row, length in enumerate(lengths):
        features[row, length:] = 9.0
    return Video(features, torch.tensor(lengths))


def mels(batch, seed=2):
    return torch.randn(batch, 8, 2 * FRAMES, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def memory_of(whisper, mel):
    return whisper.model.encoder(mel).last_hidden_state


def random_tokens(*shape, seed=3):
    """Project ids of texts that follow sos."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(9, VOCABULARY + 1, shape, generator=generator)
    tokens[:, 0] = PROMPT[-1] + 1
    return tokens


@torch.no_grad()
def reference_logits(whisper, tokens, memory):
    """Of transformers, (B, U, vocabulary), for whole memories."""
    prefix = torch.tensor(PROMPT[:-1]).expand(len(tokens), -1)
    ids = torch.cat([prefix, tokens - 1], dim=1)
    return whisper(encoder_outputs=(memory,), decoder_input_ids=ids).logits[:, prefix.size(1) :]


def suppressed_log_probs(logits, *, first):
    """Log-probabilities of one step, (N, odim), of logits (N, vocabulary)."""
    scores = logits.log_softmax(dim=-1)
    scores[:, SUPPRESSED] = -torch.inf
    if first:
        scores[:, SUPPRESSED_AT_FIRST] = -torch.inf
    blank = torch.full((len(logits), 1), -torch.inf)
    return torch.cat([blank, scores], dim=1)


@pytest.mark.parametrize("part", ["whole", "model"])
@torch.no_grad()
def test_equals_transformers(whisper, make_decoder, tmp_path, part):
    """Also from a folder of WhisperModel, where weights have shorter names."""
    decoder = make_decoder()
    if part != "whole":
        whisper.model.save_pretrained(tmp_path)
        decoder = WhisperDecoder(str(tmp_path), memory_dim=DIM, prompt=PROMPT, eos=EOS + 1).eval()
    memory, tokens = memory_of(whisper, mels(3)), random_tokens(3, MAX_TOKENS + 1)
    lengths = torch.full((3,), FRAMES)
    logits = decoder(tokens, memory, lengths)
    assert logits.shape == (3, MAX_TOKENS + 1, decoder.odim - 1) == (3, MAX_TOKENS + 1, VOCABULARY)
    torch.testing.assert_close(logits, reference_logits(whisper, tokens, memory))
    features = decoder.features(tokens, memory, lengths)
    assert features.shape == (3, MAX_TOKENS + 1, DIM)
    torch.testing.assert_close(decoder.logits(features[:, 2]), logits[:, 2])


@torch.no_grad()
def test_only_a_memory_of_another_size_is_projected(whisper, make_decoder):
    assert not list(make_decoder().memory_projection.parameters())
    decoder = make_decoder(memory_dim=10)
    memory, tokens = torch.randn(2, 9, 10), random_tokens(2, 5)
    expected = reference_logits(whisper, tokens, decoder.memory_projection(memory))
    torch.testing.assert_close(decoder(tokens, memory, torch.tensor([9, 9])), expected)


@torch.no_grad()
def test_memory_is_kept_once_an_utterance(make_decoder):
    decoder = make_decoder(video_dim=VIDEO)
    video = make_video(VIDEO, 5, [5, 2])
    state = decoder.init(torch.randn(2, 7, DIM), torch.tensor([7, 4]), BEAM, video)
    for pairs, frames in ((state.memory, 7), (state.video, 5)):
        assert [part.shape for pair in pairs for part in pair] == 4 * [(2, 4, frames, DIM // 4)]


def test_suppresses_the_end_symbol_as_first_token_only(tmp_path):
    """Also ids that the output layer does not have are given."""
    make_whisper(tmp_path, suppress=[9, EOS, VOCABULARY], begin=[EOS, 10, 220])
    options = {"memory_dim": DIM, "prompt": PROMPT, "eos": EOS + 1}
    decoder = WhisperDecoder(str(tmp_path), **options, suppress=(2, 3, EOS, 99)).eval()
    state = decoder.init(torch.randn(1, 5, DIM), torch.tensor([5]), 2)
    for suppressed in ({0, 3, 4, 10, 11, EOS + 1}, {0, 3, 4, 10}):
        scores, state = decoder.score(torch.tensor([PROMPT[-1] + 1] * 2), state)
        for row in scores:
            assert set(row.isneginf().nonzero().flatten().tolist()) == suppressed
        assert (scores.exp().sum(1) < 1).all()  # What is suppressed keeps its share.


def test_without_a_generation_config_nothing_is_suppressed(tmp_path):
    make_whisper(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    decoder = WhisperDecoder(str(tmp_path), memory_dim=DIM, prompt=PROMPT, eos=EOS + 1)
    assert decoder.suppressed_at_first.nonzero().tolist() == [[0]]


def search(decoder, beam_size, memory, max_tokens, min_tokens=0, **options):
    beam_search = BatchBeamSearch(
        beam_size,
        decoder.odim,
        weights={"decoder": 1.0},
        scorers={"decoder": decoder},
        sos=PROMPT[-1] + 1,
        eos=EOS + 1,
        **options,
    )
    lengths = torch.full((len(memory),), memory.size(1))
    return beam_search(memory, lengths, maxlenratio=-max_tokens, minlenratio=-min_tokens)


def text(ids):
    """Ids up to the end symbol, of which generate pads with more."""
    ids = ids.tolist()
    return ids[: ids.index(EOS)] if EOS in ids else ids


def generate(whisper, mel, **options):
    """The texts that transformers finds, in the tokenizer's ids."""
    prompt = torch.tensor(PROMPT).expand(len(mel), -1)
    found = whisper.generate(
        mel,
        decoder_input_ids=prompt,
        attention_mask=torch.ones(len(mel), mel.size(2)),
        do_sample=False,
        max_length=POSITIONS,
        **options,
    )
    return [text(row) for row in found]


@torch.no_grad()
def test_greedy_search_equals_generate(tmp_path):
    lengths = set()
    for seed in range(4):
        whisper = make_whisper(tmp_path, seed)
        decoder = WhisperDecoder(str(tmp_path), memory_dim=DIM, prompt=PROMPT, eos=EOS + 1).eval()
        mel = mels(4, seed)
        found = search(decoder, 1, memory_of(whisper, mel), MAX_TOKENS)
        ours = [text(hypotheses[0].yseq[1:] - 1) for hypotheses in found]
        assert ours == generate(whisper, mel)
        lengths |= {len(ids) for ids in ours}
    assert MAX_TOKENS in lengths
    assert len(lengths) > 4


def log_prob(whisper, ids, memory):
    """Log-probability of a text, given in the tokenizer's ids, and its end if it is not cut off."""
    targets = ids if len(ids) == MAX_TOKENS else [*ids, EOS]
    tokens = torch.tensor([[PROMPT[-1], *targets[:-1]]]) + 1
    logits = reference_logits(whisper, tokens, memory)[0]
    steps = [
        suppressed_log_probs(row[None], first=step == 0)[0, target + 1]
        for step, (row, target) in enumerate(zip(logits, targets, strict=True))
    ]
    return torch.stack(steps).sum().item()


@pytest.mark.parametrize("beam", [2, 5])
@torch.no_grad()
def test_beam_search_is_no_worse_than_generate(tmp_path, beam):
    improved = 0
    for seed in range(1, 4):
        whisper = make_whisper(tmp_path, seed)
        decoder = WhisperDecoder(str(tmp_path), memory_dim=DIM, prompt=PROMPT, eos=EOS + 1).eval()
        mel = mels(4, seed)
        memory = memory_of(whisper, mel)
        found = search(decoder, beam, memory, MAX_TOKENS)
        theirs = generate(whisper, mel, num_beams=beam, length_penalty=0.0, early_stopping="never")
        greedy = generate(whisper, mel)
        for row, hypotheses in enumerate(found):
            rows = slice(row, row + 1)
            ours = log_prob(whisper, text(hypotheses[0].yseq[1:] - 1), memory[rows])
            assert hypotheses[0].score == pytest.approx(ours, abs=1e-4)
            assert ours >= log_prob(whisper, theirs[row], memory[rows]) - 1e-4
            improved += ours > log_prob(whisper, greedy[row], memory[rows]) + 0.01
    assert improved > 3


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("beam", [2, 5])
@torch.no_grad()
def test_beam_search_equals_generate(tmp_path, beam, normalize):
    texts = set()
    for seed in range(1, 4):
        whisper = make_whisper(tmp_path, seed)
        decoder = WhisperDecoder(str(tmp_path), memory_dim=DIM, prompt=PROMPT, eos=EOS + 1).eval()
        mel = mels(4, seed)
        options = {"end_when_beaten": True, "length_normalization": normalize}
        found = search(decoder, beam, memory_of(whisper, mel), MAX_TOKENS, **options)
        theirs = generate(whisper, mel, num_beams=beam, length_penalty=float(normalize))
        assert [text(hypotheses[0].yseq[1:] - 1) for hypotheses in found] == theirs
        texts |= set(map(tuple, theirs))
    assert len(texts) > 6


@torch.no_grad()
def test_hypotheses_cannot_outgrow_the_positions(make_decoder):
    decoder = make_decoder()
    assert decoder.max_tokens(5) == MAX_TOKENS
    memory = torch.randn(2, 5, DIM)
    for hypotheses in search(decoder, BEAM, memory, MAX_TOKENS + 5, min_tokens=MAX_TOKENS):
        assert {len(hypothesis.yseq) for hypothesis in hypotheses} == {MAX_TOKENS + 2}
        assert all(torch.tensor(hypothesis.score).isfinite() for hypothesis in hypotheses)


@torch.no_grad()
def test_scores_at_and_beyond_the_last_position(whisper, make_decoder):
    """The last position still tells how probable the end is."""
    decoder = make_decoder()
    memory, tokens = memory_of(whisper, mels(2)), random_tokens(2, MAX_TOKENS + 3)
    state = decoder.init(memory, torch.full((2,), FRAMES), 1)
    expected = reference_logits(whisper, tokens[:, : MAX_TOKENS + 1], memory)[:, -1]
    expected = suppressed_log_probs(expected, first=False)[:, EOS + 1]
    for step in range(MAX_TOKENS + 3):
        scores, state = decoder.score(tokens[:, step], state)
        state = decoder.reorder(state, torch.arange(2))
        allowed = scores.isfinite().sum(1).tolist()
        if step < MAX_TOKENS:
            assert allowed == [VOCABULARY - len(SUPPRESSED) - 2 * (step == 0)] * 2
        else:
            assert allowed == [1, 1]
            expected = expected if step == MAX_TOKENS else torch.zeros(2)
            torch.testing.assert_close(scores[:, EOS + 1], expected)


@torch.no_grad()
def test_gates_to_video_start_closed(make_decoder):
    memory, tokens, lengths = torch.randn(2, 9, DIM), random_tokens(2, 5), torch.tensor([9, 6])
    audio_only = make_decoder()(tokens, memory, lengths)
    for gate in (0.0, 0.5):
        decoder = make_decoder(video_dim=VIDEO, gate=gate)
        logits = decoder(tokens, memory, lengths, make_video(VIDEO, 7, [7, 5]))
        if gate == 0.0:
            torch.testing.assert_close(logits, audio_only)
            continue
        assert (logits - audio_only).abs().amax(dim=2).min() > 0.01
        changed = decoder(tokens, memory, lengths, make_video(VIDEO, 7, [7, 5]))
        assert (logits - changed).abs().amax(dim=2).min() > 0.01


@torch.no_grad()
def test_loads_the_checkpoint_in_bfloat16(make_decoder):
    """Also under autocast; the new weights stay as they are."""
    memory, tokens = torch.randn(2, 9, 10), random_tokens(2, 5)
    lengths, video = torch.tensor([9, 6]), make_video(VIDEO, 7, [7, 5])
    options = {"memory_dim": 10, "video_dim": VIDEO}
    expected = make_decoder(**options)(tokens, memory, lengths, video)
    for dtype in (torch.float32, torch.bfloat16):
        decoder = make_decoder(**options, dtype=dtype)
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = decoder(tokens, memory, lengths, video)
                state = decoder.init(memory, lengths, 1, video)
                scores, _ = decoder.score(tokens[:, 0], state)
            assert scores.dtype == torch.float32
            error = (logits.float() - expected).abs().mean() / expected.abs().mean()
            exact = dtype == torch.float32 and not autocast
            # bfloat16 has 8 bits, and the scores spread over about 30.
            assert error < (1e-6 if exact else 0.05)
            step = suppressed_log_probs(expected[:, 0].clone(), first=True)
            finite = step.isfinite()
            torch.testing.assert_close(scores.isfinite(), finite)
            error = (scores - step)[finite].abs().max()
            assert error < (1e-4 if exact else 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ()}, r"prompt \(\): .* at least one id, of 0 to 59: take the tokenizer"),
        ({"prompt": (2, 60)}, r"prompt \(2, 60\): .* of 0 to 59: take the tokenizer"),
        ({"prompt": (2,) * 24}, "24 tokens leaves no room .* has 24 positions: shorten"),
        ({"eos": 61}, "eos 61: .* an id of 1 to 60: take the tokenizer"),
    ],
)
def test_names_what_does_not_fit(make_decoder, options, message):
    with pytest.raises(ValueError, match=message):
        make_decoder(**options)


def test_names_texts_that_are_too_long(make_decoder):
    decoder = make_decoder()
    message = "a text has 21 tokens, .* at most 20 after its prompt: .*leave the utterance out"
    with pytest.raises(ValueError, match=message):
        decoder(random_tokens(2, 22), torch.randn(2, 5, DIM), torch.tensor([5, 5]))


def test_names_another_kind_of_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "wavlm"}))
    with pytest.raises(ValueError, match="--decoder-name .* is a checkpoint of wavlm, .*whisper"):
        WhisperDecoder(str(tmp_path), memory_dim=DIM, prompt=PROMPT, eos=EOS + 1)
