"""Cross entropy straight from hidden states, a few rows at a time, so that the logits never exist whole.

Shape letters: N rows, M rows of one slice, C = d_model, V = padded_vocab_size, K = vocab_size of these.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distft.data.batch import IGNORE_INDEX

# 16 MiB of fp32 logits: smaller slices pack the weight more often; from 32 MiB on, malloc maps memory anew.
_CPU_SLICE_ELEMENTS = 2**22
_GPU_SLICE_ELEMENTS = 2**27  # 512 MiB: large products, yet little beside the 20 GiB of 40k x 128k logits


@dataclass(frozen=True, slots=True)
class CrossEntropySum:
    """Summed cross entropy of `labels` under `hidden @ weight.T`, in fp32; a `FromHidden` of the model.

    Rows labelled `IGNORE_INDEX` and columns from `vocab_size` on take no part. To each row's
    `(1 - s) * nll + s * mean over the vocabulary of -log p` is added `z_loss * logsumexp**2`
    (s: `label_smoothing`, Szegedy et al. 2015; z-loss: Chowdhery et al. 2022, arXiv:2204.02311, section 5).
    """

    vocab_size: int
    z_loss: float = 0.0
    label_smoothing: float = 0.0

    def __call__(self, hidden_NC: Tensor, weight_VC: Tensor, labels_N: Tensor) -> Tensor:
        loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden_NC, weight_VC, labels_N, self
        )
        return loss


@dataclass(frozen=True, slots=True)
class CrossEntropyScore:
    """Evaluation's counterpart: float64 [2], the plain loss's sum and the number of correct guesses."""

    vocab_size: int

    @torch.no_grad()
    def __call__(self, hidden_NC: Tensor, weight_VC: Tensor, labels_N: Tensor) -> Tensor:
        weight_KC = weight_VC[: self.vocab_size]
        sums = torch.zeros(2, dtype=torch.float64, device=hidden_NC.device)
        for rows in _slices(hidden_NC, self.vocab_size):
            logits_MK = (hidden_NC[rows] @ weight_KC.T).float()
            labels_M = labels_N[rows]
            counts_M = labels_M != IGNORE_INDEX
            target_M = labels_M.clamp_min(0)
            logp_M = torch.log_softmax(logits_MK, dim=-1).gather(1, target_M[:, None])[:, 0]
            sums[0] -= logp_M.double().where(counts_M, 0.0).sum()
            sums[1] += ((logits_MK.argmax(dim=-1) == target_M) & counts_M).sum()
        return sums


def _slices(hidden_NC: Tensor, vocab_size: int) -> list[slice]:
    num_rows = hidden_NC.shape[0]
    elements = _CPU_SLICE_ELEMENTS if hidden_NC.device.type == "cpu" else _GPU_SLICE_ELEMENTS
    size = max(elements // vocab_size, 1)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


class _LinearCrossEntropy(torch.autograd.Function):
    """Finds both gradients in the forward pass, while a slice's logits are at hand."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NC: Tensor, weight_VC: Tensor, labels_N: Tensor, terms: CrossEntropySum
    ) -> Tensor:
        weight_KC = weight_VC[: terms.vocab_size]
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden_NC) if needs_hidden else None
        weight_grad = torch.zeros_like(weight_VC, dtype=torch.float32) if needs_weight else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden_NC.device)
        for rows in _slices(hidden_NC, terms.vocab_size):
            hidden_MC = hidden_NC[rows]
            slice_loss, grad_MK, counts_M = _slice_loss(hidden_MC @ weight_KC.T, labels_N[rows], terms)
            loss += slice_loss
            if hidden_grad is not None:
                hidden_grad[rows] = (grad_MK @ weight_KC) * counts_M[:, None]
            if weight_grad is not None:
                # A row that does not count is taken out here: C numbers to clear, where the gradient has K.
                hidden_MC = hidden_MC * counts_M[:, None]
                _add_product(weight_grad[: terms.vocab_size], grad_MK.T, hidden_MC)
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.weight_dtype = weight_VC.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        if hidden_grad is not None:
            hidden_grad = (hidden_grad * upstream).to(hidden_grad.dtype)
        if weight_grad is not None:
            weight_grad = (weight_grad * upstream).to(ctx.weight_dtype)
        return hidden_grad, weight_grad, None, None


def _slice_loss(logits_MK: Tensor, labels_M: Tensor, terms: CrossEntropySum) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss, gradient by the logits (for all rows), and which rows count (0 or 1)."""
    counts_M = labels_M != IGNORE_INDEX
    target_M1 = labels_M.clamp_min(0)[:, None]
    smoothing, vocab_size = terms.label_smoothing, logits_MK.shape[1]
    grad_MK = torch.softmax(logits_MK, dim=-1, dtype=torch.float32)
    # One exponential an element: the row's largest probability is at least 1 / K, so its logarithm is exact.
    logsumexp_M = logits_MK.amax(dim=-1).float() - grad_MK.amax(dim=-1).log()
    loss_M = logsumexp_M - (1 - smoothing) * logits_MK.gather(1, target_M1)[:, 0]
    if smoothing:
        loss_M = loss_M - smoothing * logits_MK.mean(dim=-1, dtype=torch.float32)
    if terms.z_loss:
        loss_M = loss_M + terms.z_loss * logsumexp_M.square()
        grad_MK = grad_MK * (1 + 2 * terms.z_loss * logsumexp_M)[:, None]
    if smoothing:
        grad_MK = grad_MK - smoothing / vocab_size
    grad_MK.scatter_add_(1, target_M1, torch.full_like(target_M1, smoothing - 1, dtype=torch.float32))
    return loss_M.where(counts_M, 0.0).sum(), grad_MK.to(logits_MK.dtype), counts_M.to(logits_MK.dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
