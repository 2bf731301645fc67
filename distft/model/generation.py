"""Text generation from a language model, token by token, with a key-value cache.

Shape letters: B rows, P positions of the longest prompt, S positions so far, G key-value heads, D head_dim,
V = vocab_size.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distft.errors import ConfigError
from distft.model.with_heads import ModelWithHeads

IsFinished = Callable[[int, list[int]], bool]  # of a row's number and its new tokens


class Decoder:
    """Runs the model over a batch of prompts and over the tokens that follow them.

    Prompts are padded on the left, so that the next token of every row is in the same column.
    """

    def __init__(self, model: ModelWithHeads, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self._device)
        self._num_positions = max(len(prompt) for prompt in prompts)
        padded = [[0] * (self._num_positions - len(prompt)) + list(prompt) for prompt in prompts]
        self._prompt_BP = torch.tensor(padded, dtype=torch.int64, device=self._device)
        num_padding_B = self._num_positions - lengths
        self._num_padding_B = num_padding_B if bool(num_padding_B.any()) else None
        self._next_position_B = self._num_positions - num_padding_B  # of the next token
        self._caches = model.new_caches(self._num_positions + max_new_tokens)

    def prefill(self) -> Tensor:
        """Process the prompts; return logits [B, V] of the token after each."""
        positions_BP = torch.arange(self._num_positions, device=self._device).expand_as(self._prompt_BP)
        if self._num_padding_B is not None:
            positions_BP = (positions_BP - self._num_padding_B[:, None]).clamp_min(0)
        return self._logits(self._prompt_BP, positions_BP)

    def decode(self, token_B: Tensor) -> Tensor:
        """Append one token to each row; return logits [B, V] of the token after it."""
        # Finished rows stay in the batch, so their positions must stay inside the table of learned positions.
        position_B = self._next_position_B.clamp_max(self._model.config.longest_row - 1)
        self._next_position_B = self._next_position_B + 1
        return self._logits(token_B[:, None], position_B[:, None])

    def _logits(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        logits = self._model.forward_cached(input_ids, position_ids, self._caches, self._num_padding_B)
        return logits[:, -1, : self._model.config.vocabulary_size].float()


@torch.no_grad()
def generate(
    model: ModelWithHeads,
    input_ids: Sequence[Sequence[int]] | Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    is_finished: IsFinished | None = None,
    num_kept: int = 0,
    not_empty: Collection[int] = (),
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, up to and including `eos_id`.

    A row ends at `eos_id`, after `max_new_tokens`, or when `is_finished` says so of its number and its new
    tokens; the rows `not_empty` do not begin with `eos_id`. Beyond `max_seq_len` tokens a row's window
    slides: `window_of` says what the model sees.

    Temperature 0 picks the most likely token. Otherwise `generator` (on the model's device) draws one of the
    `top_k` most likely, restricted to the fewest of them whose probabilities add up to `top_p`. Prompts may
    differ in length; no row influences another. Raises `ConfigError` that lists every invalid argument.

    An encoder with a decoder reads each prompt as a source. There is no window: a row ends when it is full.
    """
    prompts = input_ids.tolist() if isinstance(input_ids, Tensor) else [list(ids) for ids in input_ids]
    _check_request(
        model, prompts, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p
    )
    if not prompts or not max_new_tokens:
        return [[] for _ in prompts]
    rows = _Rows(prompts, model.config.longest_row, min(num_kept, model.config.longest_row - 1))
    is_source = model.config.is_encoder_decoder
    with _eval_mode(model):
        while True:
            decoder = rows.start_decoder(model, max_new_tokens)
            logits_BV = decoder.prefill()
            if eos_id is not None and not any(rows.new_tokens):
                logits_BV[list(not_empty), eos_id] = -torch.inf
            while True:
                token_B = sample(logits_BV, temperature, top_k, top_p, generator)
                rows.append(
                    token_B.tolist(),
                    lambda number, new: (
                        new[-1] == eos_id
                        or len(new) == max_new_tokens
                        or (is_source and len(prompts[number]) + len(new) > model.config.longest_row)
                        or (is_finished is not None and is_finished(number, new))
                    ),
                )
                if not any(rows.is_open):
                    return rows.new_tokens
                if rows.slide():
                    break
                logits_BV = decoder.decode(token_B)


class _Rows:
    """The new tokens of each prompt, what the model sees of each row, and which rows go on.

    Finished rows stay in the batch, so that they do not change what is drawn for the others.
    """

    def __init__(self, prompts: Sequence[list[int]], max_seq_len: int, num_kept: int) -> None:
        self.new_tokens: list[list[int]] = [[] for _ in prompts]
        self.is_open = [True] * len(prompts)
        self._max_seq_len = max_seq_len
        self._num_kept = num_kept
        self._windows = [ids[:num_kept] + ids[num_kept:][-(max_seq_len - num_kept) :] for ids in prompts]

    def start_decoder(self, model: ModelWithHeads, max_new_tokens: int) -> Decoder:
        """A decoder with room for all tokens until a window slides."""
        shortest = min(
            len(window) for window, is_open in zip(self._windows, self.is_open, strict=True) if is_open
        )
        return Decoder(model, self._windows, min(max_new_tokens, self._max_seq_len - shortest))

    def append(self, tokens: Sequence[int], is_finished: IsFinished) -> None:
        """Add a token to each row that is open, and close those that are finished."""
        for number, token in enumerate(tokens):
            if self.is_open[number]:
                self.new_tokens[number].append(token)
                self._windows[number].append(token)
                self.is_open[number] = not is_finished(number, self.new_tokens[number])

    def slide(self) -> bool:
        """Whether an open row has outgrown the model: then the windows have slid, and need a new decoder."""
        pairs = list(zip(self._windows, self.is_open, strict=True))
        if all(len(window) <= self._max_seq_len for window, is_open in pairs if is_open):
            return False
        self._windows = [
            window_of(window, self._max_seq_len, self._num_kept) if is_open else window[-1:]
            for window, is_open in pairs
        ]
        return True


def window_of(ids: Sequence[int], max_seq_len: int, num_kept: int = 0) -> list[int]:
    """What the model sees of a row: all of it, or its first `num_kept` tokens and half of `max_seq_len`.

    Half, because the positions and hence the whole cache change whenever the window slides.
    """
    if len(ids) <= max_seq_len:
        return list(ids)
    return [*ids[:num_kept], *ids[-max(max_seq_len // 2 - num_kept, 1) :]]


def sample(
    logits_BV: Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token per row, int64 [B]. `top_p` is nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751)."""
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    sorted_BV, ids_BV = (logits_BV / temperature).sort(dim=-1, descending=True, stable=True)
    probabilities_BV = sorted_BV[:, :top_k].softmax(dim=-1)
    if top_p is not None:
        # Sum of the probabilities of all tokens that are more likely.
        before_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV
        before_BV[:, 0] = 0  # rounding must not exclude the most likely token
        probabilities_BV = probabilities_BV.masked_fill(before_BV >= top_p, 0)
    drawn_B1 = torch.multinomial(probabilities_BV, 1, generator=generator)
    return ids_BV.gather(1, drawn_B1)[:, 0]


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _check_request(
    model: ModelWithHeads,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    config = model.config
    errors = []
    if "lm_head" not in model.heads:
        errors.append("The model is a classifier: it has no logits over the vocabulary to generate from.")
    if not config.is_causal and not config.is_encoder_decoder:
        errors.append(
            f"model.{config.direction_setting}=bidirectional cannot generate: each token sees the next, "
            "which does not exist yet."
        )
    if max_new_tokens < 0:
        errors.append(f"max_new_tokens={max_new_tokens} is negative.")
    if temperature < 0:
        errors.append(f"temperature={temperature} is negative: 0 picks the most likely token.")
    if top_k is not None and top_k < 1:
        errors.append(f"top_k={top_k} leaves no token to draw: set 1 or more, or leave it out.")
    if top_p is not None and not 0 < top_p <= 1:
        errors.append(f"top_p={top_p} must be above 0 and at most 1: change it, or leave it out.")
    for number, prompt in enumerate(prompts):
        if not prompt:
            errors.append(f"Prompt {number} is empty: it needs at least one token, such as the bos_id.")
        if config.is_encoder_decoder and len(prompt) > config.longest_row:
            errors.append(
                f"Prompt {number} has {len(prompt)} tokens, and an encoder reads a source whole: shorten it "
                f"to model.max_seq_len={config.longest_row}."
            )
        unknown = [token for token in prompt if not 0 <= token < (config.vocabulary_size or 0)]
        if unknown:
            errors.append(
                f"Prompt {number} has token {unknown[0]}, but model.vocab_size={config.vocabulary_size}: "
                f"encode it with the model's own tokenizer."
            )
    if errors:
        raise ConfigError("\n".join(errors))
