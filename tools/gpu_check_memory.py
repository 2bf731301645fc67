"""What a training step should need of a GPU's memory, in bytes. Arithmetic only.

Measured peaks far above it show copies that nobody wanted.
"""

from dataclasses import dataclass, replace
from math import prod

from distft.engine.deepspeed_config import ZeroConfig
from distft.engine.settings import LocalConfig
from distft.engine.state_bytes import StateBytes, state_bytes
from distft.model.counts import num_parameters
from distft.model.heads import LANGUAGE_MODEL
from distft.model.transformer_config import TransformerConfig
from distft.optim.adamw import AdamWConfig
from distft.optim.groups import ParameterGroup

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_LOGITS_CHUNK_NUMEL = 2**27  # the cross entropy's chunk on a GPU
# Of a chunk, at the same time: logits and gradient in the compute format, the softmax in fp32.
_LOGITS_CHUNK_BYTES = 2 + 2 + 4


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """One rank's settings, as far as memory depends on them."""

    model: TransformerConfig
    precision: str
    micro_batch_size: int
    seq_len: int
    zero_stage: int | None = None  # None: the local engine
    checkpointing: str = "none"  # none, selective or full
    is_compiled: bool = False
    offloads_optimizer: bool = False

    def predicted_bytes(self) -> int:
        """The peak: all states, saved activations, and the logits of one chunk."""
        return self.state_bytes() + self._activation_bytes() + self._cross_entropy_bytes()

    def state_bytes(self) -> int:
        """Weights, gradients, master weights and moments on the GPU."""
        states = self._states()
        # At stages 1 to 3 gradients add up in fp32 beside those of the backward, in the weights' format.
        backward = 0 if self.zero_stage in {None, 0} else states.weights
        return states.total - states.offloaded + backward

    def host_bytes(self) -> int:
        """What offload puts into the host's memory: fp32 gradients, master weights and moments."""
        return self._states().offloaded

    def _states(self) -> StateBytes:
        engine: LocalConfig | ZeroConfig = LocalConfig.model_validate({"param_dtype": self.precision})
        if self.zero_stage is not None:
            offload = "cpu" if self.offloads_optimizer else "none"
            engine = ZeroConfig.model_validate(
                {"zero_stage": self.zero_stage, "param_dtype": self.precision, "offload_optimizer": offload}
            )
        shapes = {"all": (num_parameters(self.model, LANGUAGE_MODEL),)}
        optim = AdamWConfig()
        group = ParameterGroup(("all",), weight_decay=0.0, lr_scale=1.0, updates=0, rule=optim.rule)
        return state_bytes(shapes, [group], engine, optim, world_size=1)

    def _activation_bytes(self) -> int:
        tokens = self.micro_batch_size * self.seq_len
        per_layer = self._saved_per_token() * _BYTES[self.precision] * tokens
        if self.checkpointing == "full":
            # Each block keeps its input; one block at a time has everything.
            kept = self.model.d_model * _BYTES[self.precision] * tokens
            return self.model.num_layers * kept + per_layer
        return self.model.num_layers * per_layer

    def _saved_per_token(self) -> int:
        """Elements that one block saves for its backward, for each token."""
        model = self.model
        q_size, kv_size = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        products = 2 * q_size + 2 * kv_size + 2 * model.d_ff  # q, attention's output, k, v, gate, up
        if self.checkpointing == "selective":
            return products + 2 * model.d_model
        # Both norms' inputs and outputs; without a compiler also silu(gate) and its product with up.
        elementwise = 4 * model.d_model + (0 if self.is_compiled else 2 * model.d_ff)
        return products + elementwise

    def _cross_entropy_bytes(self) -> int:
        tokens, vocab_size = self.micro_batch_size * self.seq_len, self.model.padded_vocab_size
        chunk = min(tokens * vocab_size, _LOGITS_CHUNK_NUMEL) * _LOGITS_CHUNK_BYTES
        # The gradients of hidden states and of the head, which is fp32, exist until the backward uses them.
        hidden_gradient = tokens * self.model.d_model * _BYTES[self.precision]
        return chunk + hidden_gradient + prod((vocab_size, self.model.d_model)) * 4


def largest_micro_batch(plan: MemoryPlan, limit_bytes: float) -> int:
    """The plan's micro-batch, halved until its predicted memory stays below the limit; at least 1."""
    while plan.micro_batch_size > 1 and plan.predicted_bytes() > limit_bytes:
        plan = replace(plan, micro_batch_size=plan.micro_batch_size // 2)
    return plan.micro_batch_size
