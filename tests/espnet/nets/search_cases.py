"""Scorers and memories that the tests of the search share."""

import torch

from espnet.nets.scorer_interface import ScorerInterface

FEATURES = 5


def make_memory(frames, seed=0):
    return torch.randn(frames, FEATURES, generator=torch.Generator().manual_seed(seed))


class RecurrentDecoder(ScorerInterface):
    """Scores that depend on the utterance and on every token of the prefix, in its order.

    The state holds the context of the utterance once per utterance, so that every way to mix up
    hypotheses or utterances shows.
    """

    def __init__(self, vocab_size, features, eos_bias=0.0, seed=0):
        generator = torch.Generator().manual_seed(seed)
        size = 16
        self.embedding = torch.randn(vocab_size, size, generator=generator)
        self.recurrence = torch.randn(size, size, generator=generator) * 1.5 / size**0.5
        self.context = torch.randn(features, size, generator=generator)
        self.output = torch.randn(size, vocab_size, generator=generator) * 0.7
        self.bias = torch.zeros(vocab_size)
        self.bias[-1] = eos_bias

    def summarise(self, memory, memory_lengths):
        mask = torch.arange(memory.size(1)) < memory_lengths[:, None]
        summed = (memory * mask[:, :, None]).sum(1)
        return (summed / memory_lengths.clamp(min=1)[:, None]) @ self.context

    def advance(self, tokens, hidden, context):
        hidden = torch.tanh(hidden @ self.recurrence + self.embedding[tokens] + context)
        return (hidden @ self.output + self.bias).log_softmax(-1), hidden

    def init(self, memory, memory_lengths, beam_size):
        context = self.summarise(memory, memory_lengths)
        hidden = memory.new_zeros(len(memory) * beam_size, context.size(1))
        return hidden, context, beam_size

    def score(self, tokens, state):
        hidden, context, beam_size = state
        scores, hidden = self.advance(tokens, hidden, context.repeat_interleave(beam_size, 0))
        return scores, (hidden, context, beam_size)

    def reorder(self, state, index):
        hidden, context, beam_size = state
        utterances = index.view(-1, beam_size) // beam_size
        assert (utterances == utterances[:, :1]).all()
        return hidden[index], context[utterances[:, 0]], beam_size

    def of_prefix(self, memory, sos):
        """Return a function from prefix to scores, all of it computed anew for each prefix."""
        context = self.summarise(memory[None], torch.tensor([len(memory)]))

        def scores_of(prefix):
            hidden = torch.zeros(1, context.size(1))
            for token in (sos, *prefix):
                scores, hidden = self.advance(torch.tensor([token]), hidden, context)
            return scores[0].double().numpy()

        return scores_of


class LinearCTC:
    def __init__(self, vocab_size, features, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(features, vocab_size, generator=generator)

    def log_softmax(self, memory):
        return (memory @ self.weight).log_softmax(-1)


class StepScorer(ScorerInterface):
    """Scores by a table over steps (L, V)."""

    def __init__(self, table):
        self.table = torch.tensor(table)

    def init(self, memory, memory_lengths, beam_size):
        return torch.zeros(len(memory_lengths) * beam_size, dtype=torch.int64, device=memory.device)

    def score(self, tokens, state):
        assert tokens.shape == state.shape
        return self.table[state], state + 1

    def reorder(self, state, index):
        return state[index]
