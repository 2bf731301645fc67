"""Texts that a model in training generates, on all ranks together, under any engine.

Shape letters: P prompts, T tokens of the longest one and of its continuation, C hidden size, V = vocab_size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distft.errors import ConfigError
from distft.model.generation import sample
from distft.objective.interface import Model
from distft.run.run_inputs import RunInputs
from distft.run.samples_config import SamplesConfig
from distft.run.text_stream import Stops, start_of_nothing
from distft.tokenizer import Tokenizer


def check_samples(inputs: RunInputs) -> None:
    """Raise `ConfigError` for `evaluation.samples` that the run's model cannot generate."""
    settings = inputs.config.evaluation.samples
    if settings is None:
        return
    if "lm_head" not in inputs.heads or inputs.tokenizer is None or not inputs.model.is_causal:
        raise ConfigError(
            "evaluation.samples needs a language model that reads from left to right, and this run trains "
            "none: leave samples out."
        )
    problems = []
    for number, row in enumerate(_rows(settings, inputs.tokenizer, inputs.train.document_start)):
        if len(row) + settings.max_new_tokens > inputs.model.longest_row:
            limit = f"model.max_seq_len={inputs.model.longest_row}"
            problems.append(
                f"evaluation.samples.prompts.{number} has {len(row)} tokens, and with max_new_tokens="
                f"{settings.max_new_tokens} more than {limit}: shorten it."
            )
    if problems:
        raise ConfigError("\n".join(problems))


@torch.no_grad()
def generate_samples(
    settings: SamplesConfig,
    tokenizer: Tokenizer,
    *,
    document_start: tuple[int, ...] | None,
    model: Model,
    module: nn.Module,
    device: torch.device,
) -> list[dict[str, str]]:
    """`prompt` and `text` of each prompt, as greedy `distft generate` would continue it.

    All ranks call it together, since a forward at stage 3 is a collective: so each computes every token of
    `max_new_tokens`, and what follows the end of a text is cut.
    """
    rows = _rows(settings, tokenizer, document_start)
    ids_PT, lengths_P = _padded(rows, settings.max_new_tokens)
    generator = torch.Generator().manual_seed(settings.seed)
    was_training = module.training
    module.eval()
    try:
        for offset in range(settings.max_new_tokens):
            logits_PV = _next_logits(model, ids_PT.to(device), (lengths_P + offset - 1).to(device))
            logits_PV = logits_PV[:, : tokenizer.vocab_size].float().cpu()
            if offset == 0 and tokenizer.eos_id is not None:
                logits_PV[[not prompt for prompt in settings.prompts], tokenizer.eos_id] = -torch.inf
            token_P = sample(logits_PV, settings.temperature, generator=generator)
            ids_PT[torch.arange(len(rows)), lengths_P + offset] = token_P
    finally:
        module.train(was_training)
    eos_id = tokenizer.eos_id
    prompts = [tokenizer.encode(prompt) for prompt in settings.prompts]
    stops = Stops(tokenizer, prompts, ends=() if eos_id is None else (eos_id,))
    new = [ids[len(row) :][: settings.max_new_tokens] for row, ids in zip(rows, ids_PT.tolist(), strict=True)]
    return [
        {"prompt": prompt, "text": stops.cut(number, _up_to(ids, eos_id))}
        for number, (prompt, ids) in enumerate(zip(settings.prompts, new, strict=True))
    ]


def _up_to(ids: list[int], end: int | None) -> list[int]:
    """The first ids, with the first `end` as the last one."""
    return ids[: ids.index(end) + 1] if end in ids else ids


def _next_logits(model: Model, ids_PT: Tensor, last_P: Tensor) -> Tensor:
    """Logits [P, V] of the token after each row's position `last_P`; what is behind it is not seen."""
    num_tokens = ids_PT.shape[1]

    def logits_of_last(hidden_NC: Tensor, weight_VC: Tensor, softcap: float | None = None) -> Tensor:
        rows = torch.arange(len(last_P), device=last_P.device) * num_tokens + last_P
        logits = hidden_NC[rows] @ weight_VC.T
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    return model(input_ids=ids_PT, heads=("lm_head",), losses_from_hidden={"lm_head": logits_of_last})[
        "lm_head"
    ]


def _rows(
    settings: SamplesConfig, tokenizer: Tokenizer, document_start: tuple[int, ...] | None
) -> list[list[int]]:
    """What the model reads of each prompt; a text that is empty begins behind the end of another."""
    rows = [[*(document_start or ()), *tokenizer.encode(prompt)] for prompt in settings.prompts]
    return [row or start_of_nothing(tokenizer) for row in rows]


def _padded(rows: Sequence[Sequence[int]], max_new_tokens: int) -> tuple[Tensor, Tensor]:
    """The rows with room for the new tokens, padded on the right, and their lengths."""
    lengths_P = torch.tensor([len(row) for row in rows])
    ids_PT = torch.zeros(len(rows), int(lengths_P.max()) + max_new_tokens, dtype=torch.int64)
    for number, row in enumerate(rows):
        ids_PT[number, : len(row)] = torch.tensor(row)
    return ids_PT, lengths_P
