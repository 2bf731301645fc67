"""Preferences: of two answers to a prompt, the better one is to become more likely than the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from distft.config import PathText
from distft.data.dataset import Labels, TransformContext
from distft.data.targets import ANSWER, IGNORE_INDEX, PREFERENCE, REFERENCE_LOGP
from distft.errors import ConfigError
from distft.model.config import ModelConfig
from distft.model.heads import LANGUAGE_MODEL, Heads
from distft.objective.interface import Model, Objective, ObjectiveContext, Passes, only_batch
from distft.objective.language_model import require_causal, require_no_labels

if TYPE_CHECKING:  # a configuration is checked without torch, which takes 2 s to import
    from torch import Tensor

    from distft.data.batch import AnyBatch, Batch
    from distft.data.feed import AnyFeed, Transform
    from distft.objective.preference_loss import AnswerLogps

SFT = "sft"  # name of a term, and of its targets [2B, T]: tokens of the better rows
_SCORED = "scored"  # name of targets [2B, T]: tokens whose log-probability is computed, if not just answers
_NUM_MEASURED_ROWS = 64
_PAIRS, _TOKENS = "pairs", "sft_tokens"
_MEANS = (  # metrics, over pairs
    "rewards/chosen",
    "rewards/rejected",
    "accuracy",
    "log_probabilities/chosen",
    "log_probabilities/rejected",
    "log_probabilities/accuracy",
)


class Preference(Objective):
    """Terms: `preference`, a mean over the pairs of the global batch, and `sft`, one over its tokens.

    `sft` is the cross entropy of the better answers. Rewards are `beta` times what the loss compares: of dpo
    the log-probability of an answer minus the reference's, of ipo the mean of that over the answer's tokens,
    of orpo the mean log-probability.
    """

    type: Literal["preference"] = "preference"
    loss: Literal["dpo", "ipo", "orpo"] = "dpo"
    # Of dpo and ipo how near the model stays to the reference; of orpo the weight of the term `preference`.
    beta: float = Field(0.1, gt=0, allow_inf_nan=False)
    # Of dpo: the share of pairs that are taken to be the wrong way round. Metrics are without it.
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    # Weight of the term `sft`; null: 1 with orpo, else 0.
    sft_weight: float | None = Field(None, ge=0, allow_inf_nan=False)
    sft_on_prompt: bool = False  # the prompt's tokens are targets of `sft`, too, as in TRL's ORPO
    # A checkpoint of any format, for dpo and ipo, with the run's model; null: init_from.
    reference: PathText | None = None
    # Runs with the same reference, rows and precision share there what it gives them; null: each computes it.
    reference_dir: PathText | None = None
    # Share of the positions whose logits are computed, for counts of FLOPs; null: that of the training data.
    answer_share: float | None = Field(None, gt=0, le=1)

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        problems = []
        if self.label_smoothing and self.loss != "dpo":
            problems.append(f"label_smoothing is of loss=dpo, and loss={self.loss} has none: leave it out")
        if self.reference is not None and self.loss == "orpo":
            problems.append("loss=orpo compares with no reference: leave reference out")
        if self.reference_dir is not None and self.loss == "orpo":
            problems.append("loss=orpo compares with no reference: leave reference_dir out")
        if self.sft_on_prompt and not self._sft_weight:
            problems.append("sft_on_prompt needs the term sft: set sft_weight, or leave it out")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def _sft_weight(self) -> float:
        return float(self.loss == "orpo") if self.sft_weight is None else self.sft_weight

    def heads(self, label_names: Labels) -> Heads:
        """`lm_head`. Raises `ConfigError` for labelled data."""
        require_no_labels(label_names, self.type)
        return LANGUAGE_MODEL

    def check_model(self, model: ModelConfig) -> None:
        require_causal(model, self.type)

    def resolved(self, model: ModelConfig, train: AnyFeed | None) -> Self:  # noqa: ARG002
        import numpy as np

        from distft.data.feed import Feed

        if self.answer_share is not None or not isinstance(train, Feed):
            return self
        rows = train.rows(np.arange(min(_NUM_MEASURED_ROWS, train.num_sequences)))
        if not rows.num_targets.get(ANSWER):
            return self  # other rows, which `transforms` refuses
        return self.model_copy(update={"answer_share": rows.num_targets[ANSWER] / rows.num_real_tokens})

    def transforms(self, context: TransformContext) -> Sequence[Transform]:
        import numpy as np

        if ANSWER not in context.rows(np.zeros(1, np.int64)).targets:
            raise ConfigError(
                "objective.type=preference compares two answers to a prompt, and these rows have none: set "
                "data.type=preferences."
            )
        return (self._with_sft_targets,) if self._sft_weight else ()

    def notes(self, context: TransformContext) -> Sequence[str]:
        """What is done before the first step."""
        if self.reference_target is None:
            return ()
        where = "init_from" if self.reference is None else self.reference
        return (
            f"the log-probabilities of the {2 * context.num_sequences:,} answers by the reference, {where}, "
            "are computed once, before the first step",
        )

    def term_weights(self, step: int) -> Mapping[str, float]:  # noqa: ARG002
        weights = {PREFERENCE: self.beta if self.loss == "orpo" else 1.0}
        return {**weights, SFT: self._sft_weight} if self._sft_weight else weights

    @property
    def passes(self) -> Passes:
        return Passes(logits_share=self.answer_share or 1.0)

    @property
    def reference_target(self) -> str | None:
        return None if self.loss == "orpo" else REFERENCE_LOGP

    def reference_values(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> Tensor:
        """float32 [2B]: the log-probability of each answer."""
        rows = only_batch(batch)
        sums, _ = _sums_of_answers(self._token_logps(model, rows, context), rows)
        return sums

    def num_targets(self, batch: AnyBatch) -> Mapping[str, int]:
        counts = only_batch(batch).num_targets
        return {name: counts[name] for name in self.term_weights(0)}

    def loss_sums(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> Mapping[str, Tensor]:
        rows = only_batch(batch)
        logp_BT = self._token_logps(model, rows, context)
        # Sums over no pairs have a gradient, too: every rank runs a backward.
        return {
            **self._terms(logp_BT, rows, self.label_smoothing),
            **self._measured(logp_BT.detach(), rows),
        }

    @property
    def training_sum_names(self) -> Sequence[str]:
        return (_PAIRS, *_MEANS)

    def training_metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return _means(sums) if sums.get(_PAIRS) else {}

    def evaluate(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> dict[str, Tensor]:
        """Sums over pairs and tokens, float64."""
        import torch

        rows = only_batch(batch)
        with torch.no_grad():
            logp_BT = self._token_logps(model, rows, context)
            sums = {**self._terms(logp_BT, rows, 0.0), **self._measured(logp_BT, rows)}
            sums[_TOKENS] = logp_BT.new_zeros(()) + rows.num_targets.get(SFT, 0)
            return {name: value.double() for name, value in sums.items()}

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Loss without label smoothing; means over pairs of rewards and of answers' log-probabilities.

        `accuracy` is the share of pairs whose better answer has the higher reward, and that of
        `log_probabilities` the share in which it is more likely; a tie counts half.
        """
        totals = {name: float(value) for name, value in sums.items()}
        counts = {PREFERENCE: totals[_PAIRS], SFT: totals[_TOKENS]}
        weights = self.term_weights(0)
        terms = {name: totals[name] / max(counts[name], 1) for name in weights}
        loss = sum(weight * terms[name] for name, weight in weights.items())
        return {"loss": loss, **self.term_metrics(terms, 0), **_means(totals)}

    def report(self, sums: Mapping[str, Tensor], label_names: Labels) -> Sequence[str]:  # noqa: ARG002
        """The 95 % intervals of both accuracies."""
        from distft.objective.intervals import share_line

        names = ("accuracy", "log_probabilities/accuracy")
        return [share_line(float(sums[name]), float(sums[_PAIRS]), "pairs", name) for name in names]

    def _with_sft_targets(self, batch: Batch) -> Batch:
        """With the targets of the term `sft`, and those of all tokens whose log-probability is needed."""
        import torch

        answers = batch.targets[ANSWER]
        labels = answers
        if self.sft_on_prompt:
            assert batch.lengths is not None
            is_real = torch.arange(answers.shape[1]) < batch.lengths[:, None] - 1
            followers = batch.input_ids.roll(-1, dims=1).where(is_real, IGNORE_INDEX)
            labels = answers.where(answers != IGNORE_INDEX, followers)
        is_better = (torch.arange(len(answers)) % 2 == 0)[:, None]
        own = {SFT: labels.where(is_better, IGNORE_INDEX), _SCORED: labels.where(is_better, answers)}
        counts = {name: int((target != IGNORE_INDEX).sum()) for name, target in own.items()}
        return replace(batch, targets={**batch.targets, **own}, num_targets={**batch.num_targets, **counts})

    def _token_logps(self, model: Model, rows: Batch, context: ObjectiveContext) -> Tensor:
        """fp32 [2B, T]: the log-probability of each token that is scored, and 0 for the others."""
        import torch

        from distft.objective.cross_entropy import LogProbabilities

        name = _SCORED if _SCORED in rows.targets else ANSWER
        labels_N, logp_of = rows.targets[name].flatten(), LogProbabilities(context.vocab_size)

        def logps(hidden_NC: Tensor, weight_VC: Tensor, softcap: float | None = None) -> Tensor:
            # The number of targets is known on the host, so that a GPU need not be waited for.
            scored = torch.nonzero_static(labels_N != IGNORE_INDEX, size=rows.num_targets[name])[:, 0]
            logp_M = logp_of(hidden_NC[scored], weight_VC, labels_N=labels_N[scored], softcap=softcap)
            return logp_M.new_zeros(len(hidden_NC)).index_copy(0, scored, logp_M)

        outputs = model(**rows.model_inputs, heads=("lm_head",), losses_from_hidden={"lm_head": logps})
        return outputs["lm_head"].view_as(rows.targets[name])

    def _scores(self, logp_BT: Tensor, rows: Batch) -> AnswerLogps:
        """What the loss compares, of the pairs that count."""
        values, lengths = _sums_of_answers(logp_BT, rows)
        if self.reference_target is not None:
            values = values - rows.targets[REFERENCE_LOGP].to(values.dtype)
        return _by_pair(values if self.loss == "dpo" else values / lengths.clamp_min(1), rows)

    def _terms(self, logp_BT: Tensor, rows: Batch, label_smoothing: float) -> dict[str, Tensor]:
        """Each term, summed over its targets."""
        terms = {PREFERENCE: self._losses(self._scores(logp_BT, rows), label_smoothing).sum()}
        return {**terms, SFT: _cross_entropy(logp_BT, rows)} if self._sft_weight else terms

    def _measured(self, logp_BT: Tensor, rows: Batch) -> dict[str, Tensor]:
        """Sums over pairs, for metrics."""
        scores = self._scores(logp_BT, rows)
        answers = _by_pair(_sums_of_answers(logp_BT, rows)[0], rows)
        return {
            _PAIRS: logp_BT.new_zeros(()) + rows.num_targets[PREFERENCE],
            "rewards/chosen": self.beta * scores.chosen.sum(),
            "rewards/rejected": self.beta * scores.rejected.sum(),
            "accuracy": _num_correct(scores),
            "log_probabilities/chosen": answers.chosen.sum(),
            "log_probabilities/rejected": answers.rejected.sum(),
            "log_probabilities/accuracy": _num_correct(answers),
        }

    def _losses(self, scores: AnswerLogps, label_smoothing: float) -> Tensor:
        """Of each pair."""
        from distft.objective import preference_loss

        if self.loss == "dpo":
            return preference_loss.dpo_losses(scores, self.beta, label_smoothing)
        if self.loss == "ipo":
            return preference_loss.ipo_losses(scores, self.beta)
        return preference_loss.odds_ratio_losses(scores)


def _sums_of_answers(logp_BT: Tensor, rows: Batch) -> tuple[Tensor, Tensor]:
    """The log-probability [2B] of each answer, and its tokens."""
    is_answer_BT = rows.targets[ANSWER] != IGNORE_INDEX
    return logp_BT.where(is_answer_BT, 0).sum(dim=1), is_answer_BT.sum(dim=1)


def _by_pair(values_B: Tensor, rows: Batch) -> AnswerLogps:
    """Of the pairs that count: all of a batch, or none."""
    from distft.objective.preference_loss import AnswerLogps

    values_P2 = values_B.view(-1, 2)[: rows.num_targets[PREFERENCE]]
    return AnswerLogps(values_P2[:, 0], values_P2[:, 1])


def _means(totals: Mapping[str, float]) -> dict[str, float]:
    """Metrics of what `_measured` has summed."""
    means = {name: totals[name] / max(totals[_PAIRS], 1) for name in _MEANS}
    return {**means, "rewards/margin": means["rewards/chosen"] - means["rewards/rejected"]}


def _num_correct(values: AnswerLogps) -> Tensor:
    return (values.difference.sign() + 1).sum() / 2


def _cross_entropy(logp_BT: Tensor, rows: Batch) -> Tensor:
    """Summed over the targets of `sft`."""
    return -logp_BT.where(rows.targets[SFT] != IGNORE_INDEX, 0).sum()
