"""Recurrent networks over tokens: RNN, LSTM and GRU, in one direction or both.

Shape letters: B rows, T positions, N = B * T, D documents, C input width, H output width of a layer.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from distft.model.documents import Documents, documents_of
from distft.model.dropout import dropout
from distft.model.layers import MatmulDtype
from distft.model.layout import RowLayout
from distft.model.older_configs import RecurrentConfig
from distft.model.with_heads import ModelWithHeads

_FUNCTIONS: dict[str, Callable[..., Any]] = {"rnn": torch.rnn_tanh, "lstm": torch.lstm, "gru": torch.gru}
# Of a layer: its hidden state [directions, B or D, d_hidden], and an LSTM's cell state.
State: TypeAlias = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class _TimeMajor:
    """The positions of documents in the order of torch's PackedSequence: all firsts, all seconds, ...

    The longest document comes first, so that step l is the first `batch_sizes[l]` documents.
    """

    order: Tensor  # int64 [N], positions in the batch
    inverse: Tensor  # int64 [N]
    batch_sizes: Tensor  # int64 [longest document], on the CPU

    @classmethod
    def of(cls, documents: Documents) -> "_TimeMajor":
        by_length_D = documents.lengths.argsort(descending=True, stable=True)
        ranks_D = torch.empty_like(by_length_D)
        ranks_D[by_length_D] = torch.arange(len(by_length_D), device=by_length_D.device)
        keys_N = documents.offsets * documents.num_documents + ranks_D[documents.numbers]
        order_N = keys_N.argsort()
        inverse_N = torch.empty_like(order_N)
        inverse_N[order_N] = torch.arange(len(order_N), device=order_N.device)
        return cls(order_N, inverse_N, torch.bincount(documents.offsets).cpu())


class RecurrentLayer(nn.Module):
    """One layer of `torch.nn.RNN`, `LSTM` or `GRU`, with its names of parameters.

    The weights belong to this module and not to one of torch's, which keeps lists of its own of them: ZeRO 3
    exchanges their memory. They are multiplied in the dtype that `MatmulDtype` chooses.
    """

    __call__: Callable[..., tuple[Tensor, State]]

    def __init__(self, config: RecurrentConfig, width: int) -> None:
        super().__init__()
        self._compute = _FUNCTIONS[config.type]
        self._num_states = 2 if config.type == "lstm" else 1
        self._d_hidden, self._num_directions = config.d_hidden, config.num_directions
        self.matmul_dtype = MatmulDtype()
        rows = config.num_gates * config.d_hidden
        for direction in ("", "_reverse")[: config.num_directions]:
            self.register_parameter(f"weight_ih{direction}", nn.Parameter(torch.empty(rows, width)))
            self.register_parameter(f"weight_hh{direction}", nn.Parameter(torch.empty(rows, config.d_hidden)))
            self.register_parameter(f"bias_ih{direction}", nn.Parameter(torch.empty(rows)))
            self.register_parameter(f"bias_hh{direction}", nn.Parameter(torch.empty(rows)))

    def forward(
        self, x: Tensor, batch_sizes: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        """The outputs and the last state of rows [B, T, C], or of a time-major [N, C] with `batch_sizes`."""
        dtype = self.matmul_dtype(x)
        weights = [weight.to(dtype) for weight in self.parameters(recurse=False)]
        if state is None:
            state = self.first_state(x, len(x) if batch_sizes is None else int(batch_sizes[0]))
        state = tuple(part.to(dtype) for part in state)
        shape = (True, 1, 0.0, self.training, self._num_directions == 2)  # biases, layers, dropout, ...
        hidden = state if len(state) > 1 else state[0]
        if batch_sizes is None:
            y, *new_state = self._compute(x.to(dtype), hidden, weights, *shape, True)
        else:
            y, *new_state = self._compute(x.to(dtype), batch_sizes, hidden, weights, *shape)
        return y.to(x.dtype), tuple(new_state)

    def first_state(self, x: Tensor, num_rows: int) -> State:
        """Zeros, in the dtype and on the device of `x`."""
        zeros = x.new_zeros(self._num_directions, num_rows, self._d_hidden)
        return (zeros,) * self._num_states


class RecurrentModel(ModelWithHeads):
    """Embedding, recurrent layers and heads."""

    config: RecurrentConfig

    def make_backbone(self) -> None:
        self.blocks = nn.ModuleList(
            RecurrentLayer(self.config, width) for width in self.config.input_widths()
        )

    def encode(self, x_BTC: Tensor, layout: RowLayout, dropout_keys_B: Tensor | None) -> Tensor:
        order = None
        if layout.document_ids is not None or layout.lengths is not None:
            order = _TimeMajor.of(documents_of(layout))
        for index, layer in enumerate(self.blocks):
            if index > 0 and dropout_keys_B is not None:
                x_BTC = dropout(x_BTC, self.config.dropout, dropout_keys_B, site=index)
            if order is None:
                x_BTC, _ = layer(x_BTC)
            else:
                y_NH, _ = layer(x_BTC.flatten(0, 1)[order.order], order.batch_sizes)
                x_BTC = y_NH[order.inverse].view(*layout.shape, -1)
        if dropout_keys_B is not None:
            x_BTC = dropout(x_BTC, self.config.dropout, dropout_keys_B, site=len(self.blocks))
        return x_BTC

    def new_caches(self, num_positions: int) -> Sequence[dict[str, Any]]:  # noqa: ARG002
        return [{} for _ in self.blocks]  # the state of each layer

    def encode_cached(
        self,
        x_BTC: Tensor,
        position_ids: Tensor,  # noqa: ARG002
        caches: Sequence[Any],
        num_padding_B: Tensor | None,
    ) -> Tensor:
        layers: Iterable[RecurrentLayer] = self.blocks  # type: ignore[assignment]
        for layer, cache in zip(layers, caches, strict=True):
            if cache or num_padding_B is None:
                x_BTC, cache["state"] = layer(x_BTC, state=cache.get("state"))
            else:
                x_BTC, cache["state"] = _from_first_real(layer, x_BTC, num_padding_B)
        return x_BTC


def _from_first_real(layer: RecurrentLayer, x_BTC: Tensor, num_padding_B: Tensor) -> tuple[Tensor, State]:
    """A layer's outputs and state where row b begins after `num_padding_B[b]` positions: step by step."""
    outputs, state = [], layer.first_state(x_BTC, len(x_BTC))
    for position in range(x_BTC.shape[1]):
        output, new_state = layer(x_BTC[:, position : position + 1], state=state)
        has_begun_B1 = (num_padding_B <= position)[:, None]
        state = tuple(torch.where(has_begun_B1, new, old) for new, old in zip(new_state, state, strict=True))
        outputs.append(output)
    return torch.cat(outputs, dim=1), state
