"""Keys and values of the tokens of all hypotheses of a search, written once and never moved."""

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 32
"""Most steps that room is made for at once."""

PIECE_BYTES = {"cpu": 2**22, "cuda": 2**28}
"""Keys and values that are gathered at once. On a CPU, a piece stays in the processor's cache
until it is attended to; on a GPU, few kernels are started."""


class TokenCache:
    """What the self-attention of a decoder keeps of N hypotheses that change places.

    Every step appends one row to the store of each layer for the last token of each hypothesis. A
    table tells which rows are the tokens of a hypothesis. When hypotheses change places, so do the
    rows of the table; the stores, which are thousands of times larger, stay as they are, and what
    several hypotheses have in common stands in them once.

    Args:
        layers: Number of layers.
        heads: Attention heads H.
        usual_steps: Steps that there will be at most unless told otherwise; room is not made for
            more of them at first.
    """

    def __init__(self, layers: int, heads: int, usual_steps: int = CHUNK) -> None:
        self._heads = heads
        self._chunk = max(1, min(CHUNK, usual_steps))
        self._stores: list[Tensor | None] = [None] * layers
        self._table: Tensor | None = None  # (N, U)
        self._start = self._end = 0  # rows of the last step

    @property
    def length(self) -> int:
        """Number of tokens U of each hypothesis."""
        return 0 if self._table is None else self._table.size(1)

    def begin_step(self, tokens: Tensor) -> None:
        """Adds one token to each hypothesis.

        Args:
            tokens: The tokens (N,); only their number and device matter.
        """
        self._start, self._end = self._end, self._end + len(tokens)
        rows = torch.arange(self._start, self._end, device=tokens.device).unsqueeze(1)
        self._table = rows if self._table is None else torch.cat([self._table, rows], dim=1)

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Stores the keys and values of the added tokens.

        Args:
            layer: Number of the layer.
            keys: Keys of all heads, (N, 1, D).
            values: Likewise.
        """
        store = self._stores[layer]
        if store is None or len(store) < self._end:
            more = self._chunk * len(keys)
            grown = keys.new_empty(self._start + more, 2 * keys.size(-1))
            if store is not None:
                grown[: self._start] = store[: self._start]
            store = self._stores[layer] = grown
        torch.cat([keys, values], dim=-1, out=store[self._start : self._end].unsqueeze(1))

    def read(self, layer: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Gathers the keys and values of all tokens, some hypotheses at a time.

        Args:
            layer: Number of the layer.

        Yields:
            Keys and values, each (N', H, U, D/H), of the next N' hypotheses.
        """
        store = self._stores[layer]
        limit = PIECE_BYTES.get(store.device.type, PIECE_BYTES["cuda"])
        hypothesis_bytes = self.length * store.size(1) * store.element_size()
        pieces = -(-len(self._table) // max(1, limit // hypothesis_bytes))
        for table in self._table.chunk(pieces):
            rows = store.index_select(0, table.flatten())
            rows = rows.view(*table.shape, 2, self._heads, -1)  # (N', U, 2, H, D/H)
            yield rows.permute(2, 0, 3, 1, 4).unbind(0)

    def reorder(self, index: Tensor) -> None:
        """Keeps some hypotheses, in a new order and perhaps several times.

        Args:
            index: Hypothesis that each new one continues, (N',).
        """
        self._table = self._table.index_select(0, index)
