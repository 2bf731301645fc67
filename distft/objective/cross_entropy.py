"""Cross entropy computed from hidden states in chunks of rows, so that the logits never exist all at once.

Shape letters: N rows, M rows of one chunk, C = d_model, V = padded_vocab_size, K = vocab_size.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distft.data.targets import IGNORE_INDEX

# Elements of one chunk's logits. On a CPU 16 MiB of fp32: smaller chunks repack the weight for a product more
# often, and from 32 MiB on malloc maps fresh memory for every chunk.
_CPU_CHUNK_NUMEL = 2**22
# On a GPU at most 512 MiB: large enough for fast products, and little beside the 20 GiB of 40k x 128k logits.
_GPU_CHUNK_NUMEL = 2**27


@dataclass(frozen=True, slots=True)
class FusedLinearCrossEntropy:
    """Summed cross entropy of `labels` under the logits `hidden @ weight.T`, fp32; a `HiddenLossFn`.

    Rows labelled `IGNORE_INDEX` and columns from `vocab_size` on (padding) do not count. Each other row adds
    `(1 - s) * nll + s * mean over the vocabulary of -log p + z_loss * logsumexp**2`
    (s: `label_smoothing`, Szegedy et al. 2015; z-loss: Chowdhery et al. 2022, arXiv:2204.02311, section 5).
    With `softcap` a logit x is softcap * tanh(x / softcap).
    """

    vocab_size: int
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    compiles: bool = False  # with torch.compile, into one pass over the logits of a chunk
    softcap: float | None = None  # that of the call

    def __call__(
        self, hidden_NC: Tensor, weight_VC: Tensor, labels_N: Tensor, softcap: float | None = None
    ) -> Tensor:
        return _FusedLinearCrossEntropy.apply(  # type: ignore[no-any-return, no-untyped-call]
            hidden_NC, weight_VC, labels_N, replace(self, softcap=softcap)
        )


@dataclass(frozen=True, slots=True)
class LossAndNumCorrect:
    """For evaluation: float64 [2], the sum of the plain loss and the number of correct predictions."""

    vocab_size: int

    @torch.no_grad()
    def __call__(
        self, hidden_NC: Tensor, weight_VC: Tensor, labels_N: Tensor, softcap: float | None = None
    ) -> Tensor:
        weight_KC = weight_VC[: self.vocab_size]
        sums = torch.zeros(2, dtype=torch.float64, device=hidden_NC.device)
        for rows in _row_chunks(hidden_NC, self.vocab_size):
            logits_MK = (hidden_NC[rows] @ weight_KC.T).float()
            if softcap is not None:
                logits_MK.div_(softcap).tanh_().mul_(softcap)
            labels_M = labels_N[rows]
            counts_M = labels_M != IGNORE_INDEX
            target_M = labels_M.clamp_min(0)
            logp_M = torch.log_softmax(logits_MK, dim=-1).gather(1, target_M[:, None])[:, 0]
            sums[0] -= logp_M.double().where(counts_M, 0.0).sum()
            sums[1] += ((logits_MK.argmax(dim=-1) == target_M) & counts_M).sum()
        return sums


@dataclass(frozen=True, slots=True)
class LogProbabilities:
    """fp32 [N]: the log-probability of each label under the logits `hidden @ weight.T`; a `HiddenLossFn`.

    Every row has a label. Columns from `vocab_size` on do not count. The backward computes the logits again,
    chunk by chunk: what it multiplies them with is known only then.
    """

    vocab_size: int
    softcap: float | None = None  # that of the call

    def __call__(
        self, hidden_NC: Tensor, weight_VC: Tensor, labels_N: Tensor, softcap: float | None = None
    ) -> Tensor:
        return _LogProbabilities.apply(  # type: ignore[no-any-return, no-untyped-call]
            hidden_NC, weight_VC, labels_N, replace(self, softcap=softcap)
        )


def _row_chunks(hidden_NC: Tensor, vocab_size: int) -> list[slice]:
    num_rows = hidden_NC.shape[0]
    if hidden_NC.device.type == "cpu":
        size = max(_CPU_CHUNK_NUMEL // vocab_size, 1)
    else:
        # A power of two fills the tiles of a product, and mostly divides the rows of a batch: chunks of one
        # size are compiled once.
        size = 1 << (max(_GPU_CHUNK_NUMEL // vocab_size, 1).bit_length() - 1)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


class _FusedLinearCrossEntropy(torch.autograd.Function):
    """Computes both gradients in the forward pass, while a chunk's logits are in memory.

    The backward pass only scales them; recomputing the logits there would add a third to the matrix products.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_NC: Tensor, weight_VC: Tensor, labels_N: Tensor, loss_fn: FusedLinearCrossEntropy
    ) -> Tensor:
        needs_hidden_grad, needs_weight_grad = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden_NC) if needs_hidden_grad else None
        # Chunks add up in the weight's gradient, so it is fp32; padding rows of the vocabulary stay 0.
        weight_grad = torch.zeros_like(weight_VC, dtype=torch.float32) if needs_weight_grad else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden_NC.device)
        loss_and_grad = _compiled_loss_and_grad() if loss_fn.compiles else _loss_and_grad
        for rows in _row_chunks(hidden_NC, weight_VC.shape[0]):
            hidden_MC = hidden_NC[rows]
            # With all padded rows: tensor cores are fast on multiples of 8 or 64, which K may not be.
            logits_MV = hidden_MC @ weight_VC.T
            slope_MV = None if loss_fn.softcap is None else _cap(logits_MV, loss_fn.softcap)
            logits_MV[:, loss_fn.vocab_size :] = -torch.inf
            chunk_loss, grad_MV, counts_M = loss_and_grad(
                logits_MV, labels_N[rows], loss_fn.vocab_size, loss_fn.z_loss, loss_fn.label_smoothing
            )
            if slope_MV is not None:
                grad_MV = grad_MV * slope_MV
            loss += chunk_loss
            if hidden_grad is not None:
                hidden_grad[rows] = (grad_MV @ weight_VC) * counts_M[:, None]
            if weight_grad is not None:
                # Zero the ignored rows here: a hidden row has C elements to clear, a row of grad_MV has V.
                hidden_MC = hidden_MC * counts_M[:, None]
                _add_matmul(weight_grad, grad_MV.T, hidden_MC)
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.weight_dtype = weight_VC.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        if hidden_grad is not None:
            hidden_grad = (hidden_grad * grad_output).to(hidden_grad.dtype)
        if weight_grad is not None:
            weight_grad = (weight_grad * grad_output).to(ctx.weight_dtype)
        return hidden_grad, weight_grad, None, None


class _LogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NC: Tensor, weight_VC: Tensor, labels_N: Tensor, settings: LogProbabilities
    ) -> Tensor:
        ctx.save_for_backward(hidden_NC, weight_VC, labels_N)
        ctx.settings = settings
        logp_N = torch.empty(len(hidden_NC), dtype=torch.float32, device=hidden_NC.device)
        for rows in _row_chunks(hidden_NC, weight_VC.shape[0]):
            logp_MV, _ = _log_softmax(hidden_NC[rows], weight_VC, settings)
            logp_N[rows] = logp_MV.gather(1, labels_N[rows, None])[:, 0]
        return logp_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_NC, weight_VC, labels_N = ctx.saved_tensors
        hidden_grad = torch.empty_like(hidden_NC) if ctx.needs_input_grad[0] else None
        weight_grad = torch.zeros_like(weight_VC, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for rows in _row_chunks(hidden_NC, weight_VC.shape[0]):
            logp_MV, slope_MV = _log_softmax(hidden_NC[rows], weight_VC, ctx.settings)
            # The gradient of log p by the logits is one_hot(label) - p.
            grad_MV = logp_MV.exp_().mul_(-grad_N[rows, None])
            grad_MV.scatter_add_(1, labels_N[rows, None], grad_N[rows, None])
            if slope_MV is not None:
                grad_MV *= slope_MV
            grad_MV = grad_MV.to(hidden_NC.dtype)
            if hidden_grad is not None:
                hidden_grad[rows] = grad_MV @ weight_VC
            if weight_grad is not None:
                _add_matmul(weight_grad, grad_MV.T, hidden_NC[rows])
        return hidden_grad, None if weight_grad is None else weight_grad.to(weight_VC.dtype), None, None


def _log_softmax(
    hidden_MC: Tensor, weight_VC: Tensor, settings: LogProbabilities
) -> tuple[Tensor, Tensor | None]:
    """fp32 [M, V] log-probabilities; and the derivatives of capped logits by what they were."""
    # With all padded rows, as above.
    logits_MV = (hidden_MC @ weight_VC.T).float()
    slope_MV = None if settings.softcap is None else _cap(logits_MV, settings.softcap)
    logits_MV[:, settings.vocab_size :] = -torch.inf
    return torch.log_softmax(logits_MV, dim=-1), slope_MV


def _cap(logits_MV: Tensor, softcap: float) -> Tensor:
    """Cap logits in place; returns the derivatives by what they were."""
    shares_MV = torch.tanh(logits_MV.float() / softcap)
    logits_MV.copy_(shares_MV * softcap)
    return (1 - shares_MV.square()).to(logits_MV.dtype)


@cache
def _compiled_loss_and_grad() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(_loss_and_grad_in_two_passes)


def _loss_and_grad_in_two_passes(
    logits_MV: Tensor, labels_M: Tensor, vocab_size: int, z_loss: float, smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What `_loss_and_grad` computes, as a compiler fuses it: a reduction over the logits, then the gradient.

    The eager form keeps the softmax in memory, to add to it and to reduce it. Not compiled, on an H100 (124M
    parameters), that and its casts take 25 of a step's 81 ms.
    """
    counts_M = labels_M != IGNORE_INDEX
    target_M1 = labels_M.clamp_min(0)[:, None]
    logits_fp32_MV = logits_MV.float()
    logsumexp_M = torch.logsumexp(logits_fp32_MV, dim=-1)
    loss_M = logsumexp_M - (1 - smoothing) * logits_MV.gather(1, target_M1)[:, 0]
    grad_MV = torch.exp(logits_fp32_MV - logsumexp_M[:, None])
    if z_loss:
        loss_M = loss_M + z_loss * logsumexp_M.square()
        grad_MV = grad_MV * (1 + 2 * z_loss * logsumexp_M)[:, None]
    columns_V = torch.arange(logits_MV.shape[1], device=logits_MV.device)
    if smoothing:
        loss_M = loss_M - smoothing * logits_fp32_MV[:, :vocab_size].mean(dim=-1)
        grad_MV = grad_MV - (columns_V < vocab_size) * (smoothing / vocab_size)
    grad_MV = grad_MV - (columns_V == target_M1) * (1 - smoothing)
    return loss_M.where(counts_M, 0.0).sum(), grad_MV.to(logits_MV.dtype), counts_M.to(logits_MV.dtype)


def _loss_and_grad(
    logits_MV: Tensor, labels_M: Tensor, vocab_size: int, z_loss: float, smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss, gradient by the logits (also of ignored rows), and whether each row counts (0 or 1)."""
    counts_M = labels_M != IGNORE_INDEX
    target_M1 = labels_M.clamp_min(0)[:, None]
    # The gradient of nll by the logits is softmax(logits) - one_hot(target): we start from the softmax.
    grad_MV = torch.softmax(logits_MV, dim=-1, dtype=torch.float32)
    # logsumexp without a second exponential per element: log p of the most likely token is its logit minus
    # logsumexp, and p is at least 1 / K, so its logarithm is accurate.
    logsumexp_M = logits_MV.amax(dim=-1).float() - grad_MV.amax(dim=-1).log()
    loss_M = logsumexp_M - (1 - smoothing) * logits_MV.gather(1, target_M1)[:, 0]
    if smoothing:
        loss_M = loss_M - smoothing * logits_MV[:, :vocab_size].mean(dim=-1, dtype=torch.float32)
    if z_loss:
        loss_M = loss_M + z_loss * logsumexp_M.square()
        grad_MV = grad_MV * (1 + 2 * z_loss * logsumexp_M)[:, None]
    if smoothing:
        grad_MV[:, :vocab_size] -= smoothing / vocab_size
    grad_MV.scatter_add_(1, target_M1, torch.full_like(target_M1, smoothing - 1, dtype=torch.float32))
    return loss_M.where(counts_M, 0.0).sum(), grad_MV.to(logits_MV.dtype), counts_M.to(logits_MV.dtype)


def _add_matmul(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)  # no temporary for the product
    elif total.device.type == "cuda":
        # One kernel that rounds nothing to bf16: 0.28 ms against 0.37, and an error of 2e-6 against 2e-3
        # (H100, 2,048 rows, vocabulary of 50,304).
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right
