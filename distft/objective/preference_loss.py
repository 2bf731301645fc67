"""Losses of a pair of answers, of which one is better, by their log-probabilities.

Shape letters: P pairs.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True, slots=True)
class AnswerLogps:
    """Log-probabilities of a prompt's answers, fp32 [P]; of whole answers, or means over their tokens."""

    chosen: Tensor
    rejected: Tensor

    @property
    def difference(self) -> Tensor:
        """How much more likely the better answer is."""
        return self.chosen - self.rejected


def dpo_losses(log_ratios: AnswerLogps, beta: float, label_smoothing: float) -> Tensor:
    """[P], of whole answers, minus the reference's (Rafailov et al. 2023, arXiv:2305.18290).

    With `label_smoothing` that share of the pairs is taken to be the wrong way round: conservative DPO.
    """
    margin = beta * log_ratios.difference
    losses = -(1 - label_smoothing) * logsigmoid(margin)
    return losses - label_smoothing * logsigmoid(-margin) if label_smoothing else losses


def ipo_losses(mean_log_ratios: AnswerLogps, beta: float) -> Tensor:
    """[P], of means over the answers' tokens, minus the reference's (Azar et al. 2023, arXiv:2310.12036).

    The paper writes sums; means are what its authors used, and what TRL computes.
    """
    return (mean_log_ratios.difference - 1 / (2 * beta)).square()


def odds_ratio_losses(mean_logps: AnswerLogps) -> Tensor:
    """[P], of means over the answers' tokens: ORPO's (Hong et al. 2024, arXiv:2403.07691)."""
    return -logsigmoid(log_odds(mean_logps.chosen) - log_odds(mean_logps.rejected))


def log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) of a log-probability.

    Accurate for p near 0 and near 1, and finite also where p is 1 as far as fp32 tells: such an answer gets
    no gradient.
    """
    logp = logp.clamp(max=-torch.finfo(torch.float32).eps)
    # Both branches are finite with finite gradients on all of the range, so that `where` hides no NaN.
    near_one = torch.log(-torch.expm1(logp.clamp(min=-1.0)))
    near_zero = torch.log1p(-torch.exp(logp.clamp(max=-math.log(2) / 2)))
    return logp - torch.where(logp > -math.log(2), near_one, near_zero)
