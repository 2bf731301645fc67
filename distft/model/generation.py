"""Text from a language model, one token at a time, with the keys and values of the past kept.

Shape letters: B rows, P positions of the longest prompt, S positions so far, G key-value heads, D head_dim,
V = vocab_size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distft.errors import ConfigError
from distft.model.head import LanguageModelHead
from distft.model.transformer import Transformer


class KeyValueCache:
    """Keys and values of one layer, in memory for `num_positions` that is taken at the first use."""

    def __init__(self, num_positions: int) -> None:
        self._num_positions = num_positions
        self._length = 0
        self._k_BSGD: Tensor | None = None
        self._v_BSGD: Tensor | None = None

    def extend(self, k_BTGD: Tensor, v_BTGD: Tensor) -> tuple[Tensor, Tensor]:
        """Keep these too; return all of them, [B, S, G, D] each."""
        if self._k_BSGD is None or self._v_BSGD is None:
            num_rows, _, *head_shape = k_BTGD.shape
            self._k_BSGD = k_BTGD.new_empty(num_rows, self._num_positions, *head_shape)
            self._v_BSGD = v_BTGD.new_empty(num_rows, self._num_positions, *head_shape)
        start, self._length = self._length, self._length + k_BTGD.shape[1]
        self._k_BSGD[:, start : self._length] = k_BTGD
        self._v_BSGD[:, start : self._length] = v_BTGD
        return self._k_BSGD[:, : self._length], self._v_BSGD[:, : self._length]


class Decoder:
    """A batch of prompts and what follows them, padded on the left so that all rows end together."""

    def __init__(self, model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self._device)
        self._num_positions = max(len(prompt) for prompt in prompts)  # P, and later S
        padded = [[0] * (self._num_positions - len(prompt)) + list(prompt) for prompt in prompts]
        self._prompt_BP = torch.tensor(padded, dtype=torch.int64, device=self._device)
        self._num_padding_B = self._num_positions - lengths
        self._is_padded = bool(self._num_padding_B.any())
        self._caches = [
            KeyValueCache(self._num_positions + max_new_tokens) for _ in range(model.config.num_layers)
        ]

    def read_prompts(self) -> Tensor:
        """Logits [B, V] of the token that follows each prompt."""
        columns = torch.arange(self._num_positions, device=self._device)
        mask = None
        if self._is_padded:
            is_real_BP = columns >= self._num_padding_B[:, None]
            # Padding sees itself: a softmax over nothing would put NaN where real positions look.
            sees = (columns <= columns[:, None]) & is_real_BP[:, None, :] | (columns == columns[:, None])
            mask = sees[:, None]
        positions_BP = (columns - self._num_padding_B[:, None]).clamp_min(0)
        return self._logits(self._prompt_BP, positions_BP, mask)

    def read(self, token_B: Tensor) -> Tensor:
        """Logits [B, V] of what follows `token_B` after all that was read before."""
        position_B = self._num_positions - self._num_padding_B
        self._num_positions += 1
        columns = torch.arange(self._num_positions, device=self._device)
        mask = (columns >= self._num_padding_B[:, None])[:, None, None, :]
        # Rows that are done are read on for company; their positions must stay in the table.
        position_B = position_B.clamp_max(self._model.config.max_seq_len - 1)
        return self._logits(token_B[:, None], position_B[:, None], mask)

    def _logits(self, input_ids: Tensor, position_ids: Tensor, mask: Tensor | None) -> Tensor:
        logits = self._model(input_ids, position_ids, caches=self._caches, cache_mask=mask)
        real: Tensor = logits[:, -1, : self._model.config.vocab_size].float()
        return real


@torch.no_grad()
def generate(
    model: Transformer,
    input_ids: Sequence[Sequence[int]] | Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, up to and with `eos_id`.

    A row ends at `eos_id`, after `max_new_tokens`, or where prompt and new tokens reach `max_seq_len`.
    Temperature 0 takes the likeliest token; otherwise one is drawn with `generator` (of the model's device)
    from the `top_k` likeliest, and of these from the fewest whose probabilities reach `top_p`. Rows of
    different lengths do not change each other. Raises `ConfigError` for what cannot be generated from.
    """
    prompts = input_ids.tolist() if isinstance(input_ids, Tensor) else [list(ids) for ids in input_ids]
    _check(model, prompts, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    rooms = [min(max_new_tokens, model.config.max_seq_len - len(prompt)) for prompt in prompts]
    written: list[list[int]] = [[] for _ in prompts]
    if not prompts or not max(rooms):
        return written
    with _evaluating(model):
        decoder = Decoder(model, prompts, max(rooms))
        logits_BV = decoder.read_prompts()
        while True:
            token_B = sample(logits_BV, temperature, top_k, top_p, generator)
            is_open = False
            for new, token, room in zip(written, token_B.tolist(), rooms, strict=True):
                if len(new) < room and (not new or new[-1] != eos_id):
                    new.append(token)
                    is_open |= len(new) < room and token != eos_id
            if not is_open:
                return written
            logits_BV = decoder.read(token_B)


def sample(
    logits_BV: Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token a row, int64 [B]."""
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    sorted_BV, ids_BV = (logits_BV / temperature).sort(dim=-1, descending=True, stable=True)
    probabilities_BV = sorted_BV[:, :top_k].softmax(dim=-1)
    if top_p is not None:
        before_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV
        before_BV[:, 0] = 0  # rounding must not rule out the likeliest
        probabilities_BV = probabilities_BV.masked_fill(before_BV >= top_p, 0)
    drawn_B1 = torch.multinomial(probabilities_BV, 1, generator=generator)
    return ids_BV.gather(1, drawn_B1)[:, 0]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _check(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    config = model.config
    faults = []
    if not isinstance(model.head, LanguageModelHead):
        faults.append("The model is a classifier: it has no scores over the vocabulary to write from.")
    if not config.is_causal:
        faults.append("model.attention=bidirectional cannot generate: each token would have to see the next.")
    if max_new_tokens < 0:
        faults.append(f"max_new_tokens={max_new_tokens} is negative.")
    if temperature < 0:
        faults.append(f"temperature={temperature} is negative: 0 takes the likeliest token.")
    if top_k is not None and top_k < 1:
        faults.append(f"top_k={top_k} leaves nothing to draw from: take 1 or more, or leave it out.")
    if top_p is not None and not 0 < top_p <= 1:
        faults.append(f"top_p={top_p} is not a probability above 0: take 1 or less, or leave it out.")
    for number, prompt in enumerate(prompts):
        if not prompt:
            faults.append(f"Prompt {number} is empty: it needs one token at least, such as the bos_id.")
        elif len(prompt) > config.max_seq_len:
            faults.append(
                f"Prompt {number} has {len(prompt)} tokens, more than model.max_seq_len="
                f"{config.max_seq_len}: shorten it."
            )
        unknown = [token for token in prompt if not 0 <= token < (config.vocab_size or 0)]
        if unknown:
            faults.append(
                f"Prompt {number} has token {unknown[0]}, but model.vocab_size={config.vocab_size}: "
                f"encode it with the model's own tokenizer."
            )
    if faults:
        raise ConfigError("\n".join(faults))
