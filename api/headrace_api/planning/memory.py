"""Memory of the fullest rank: persistent state, and what a forward pass saves for the backward pass.

State is exact except for a few kilobytes of padding. Activations are what autograd saves without recomputation, by the
method of arXiv 2205.05198, section 4, adapted to this model: RMSNorm, SwiGLU, grouped queries, and attention that saves
its inputs and output but no scores. A frozen matrix saves no input unless its adapter does, and a frozen norm saves
nothing for its weight. ``tests/trainer/engine/test_memory.py`` compares both with a real gang's allocations.
"""

from dataclasses import dataclass

from headrace_api.model import Architecture, padded_vocab
from headrace_api.parallelism import Layout
from headrace_api.stages.finetune import Lora, LoraTarget
from headrace_api.stages.training import Precision

_WEIGHT_BYTES = {Precision.FP32: 4, Precision.BF16: 2, Precision.FP8: 2}
_MAIN_WEIGHT_BYTES = {Precision.FP32: 0, Precision.BF16: 4, Precision.FP8: 4}
"""fp32 weights are updated in place; others have an fp32 main copy (arXiv 1710.03740)."""
_GRADIENT_BYTES = 4
_ADAM_BYTES = 8
"""Two moments in fp32."""
_FP8_COPY_BYTES = 2
"""For each step, Transformer Engine keeps FP8 copies of each layer's matrices and their transposes."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Saved for the backward passes in flight, including FP8 copies of the weights."""

    @property
    def state(self) -> int:
        """Bytes that persist between steps."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """Peak bytes, without temporary buffers."""
        return self.state + self.activations


@dataclass(frozen=True, kw_only=True)
class Batches:
    """How samples flow through a replica."""

    sequence_length: int
    micro_batch_size: int
    num_micro_batches: int
    """Per step and replica."""


def fullest_rank(
    arch: Architecture,
    axes: Layout,
    *,
    vocab_size: int,
    precision: Precision,
    batches: Batches,
    fused: bool,
    sequence_parallel: bool,
    lora: Lora | None = None,
) -> Memory:
    """Memory of the rank that needs the most. Tensor and data ranks of a pipeline stage need the same.

    Args:
        arch: the model.
        axes: the layout.
        vocab_size: number of tokens, unpadded.
        precision: number format of weights and matrix multiplications.
        batches: the samples in flight.
        fused: whether kernels save as little as Transformer Engine's, as on GPUs.
        sequence_parallel: whether tensor ranks also split the activations between matrices.
        lora: the adapter that is trained instead of the model, if there is one.
    """

    def memory(stage: int) -> Memory:
        parameters = num_stage_parameters(arch, axes, stage=stage, vocab_size=vocab_size)
        added = 0 if lora is None else lora.num_parameters(arch, tensor=axes.tensor) // axes.pipeline
        trained = parameters if lora is None else added
        saved = _Saved(
            arch=arch,
            axes=axes,
            precision=precision,
            fused=fused,
            sequence_parallel=sequence_parallel,
            lora=lora,
        )
        per_token = saved.bytes_per_token(stage=stage, vocab_size=vocab_size)
        # 1F1B schedule (arXiv 2104.04473, section 2.2.1): earlier pipeline stages hold more micro-batches.
        in_flight = min(axes.pipeline - stage, batches.num_micro_batches)
        tokens = batches.sequence_length * batches.micro_batch_size * in_flight
        copies = _FP8_COPY_BYTES * parameters if precision is Precision.FP8 else 0
        return Memory(
            weights=(parameters + added) * _WEIGHT_BYTES[precision],
            gradients=trained * _GRADIENT_BYTES,
            # Sharded over the data axis: ZeRO stage 1 (arXiv 1910.02054).
            optimizer=-(-trained * (_MAIN_WEIGHT_BYTES[precision] + _ADAM_BYTES) // axes.data),
            activations=tokens * per_token + copies,
        )

    return max((memory(stage) for stage in range(axes.pipeline)), key=lambda m: m.total)


def num_stage_parameters(arch: Architecture, axes: Layout, *, stage: int, vocab_size: int) -> int:
    """Parameters on one rank of a pipeline stage. Matrices are split over tensor ranks, norms are not.

    Args:
        arch: the model.
        axes: the layout.
        stage: the first one embeds tokens, the last one computes losses.
        vocab_size: number of tokens, unpadded.
    """
    hidden, first, last = arch.hidden_size, stage == 0, stage == axes.pipeline - 1
    attention = hidden * arch.head_dim * (2 * arch.heads + 2 * arch.kv_heads)
    split = attention + arch.num_biases + 3 * hidden * arch.ffn_hidden_size
    layer = split // axes.tensor + arch.num_head_norms + 2 * hidden
    table = padded_vocab(vocab_size) // axes.tensor * hidden
    # Tied embeddings are one matrix if one rank has both ends of the model, else two copies.
    tables = first + (last and not (first and arch.tie_embeddings))
    return arch.layers // axes.pipeline * layer + tables * table + (hidden if last else 0)


@dataclass(frozen=True, kw_only=True)
class _Saved:
    """What autograd saves per token of a micro-batch, on one rank."""

    arch: Architecture
    axes: Layout
    precision: Precision
    fused: bool
    sequence_parallel: bool
    lora: Lora | None

    def bytes_per_token(self, *, stage: int, vocab_size: int) -> int:
        last = stage == self.axes.pipeline - 1
        # The cross-entropy saves the softmax in fp32.
        loss = (
            self._norm(output_is_kept=self.lora is None) + 4 * padded_vocab(vocab_size) // self.axes.tensor
            if last
            else 0
        )
        return self.arch.layers // self.axes.pipeline * self._layer() + loss

    def _layer(self) -> int:
        arch, width = self.arch, 4 if self.precision is Precision.FP32 else 2
        queries, keys = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
        # Projected queries, keys and values; queries and keys again after rotary embedding; the output.
        attention = (queries + 2 * keys) + (queries + keys) + queries
        # Both projections, and the input of the last matrix; unfused kernels also save SiLU's input (made contiguous) and
        # its output.
        feed_forward = ((2 if self.fused else 4) + self._keeps(LoraTarget.FC2)) * arch.ffn_hidden_size
        norms = sum(self._norm(output_is_kept=self._keeps(target)) for target in (LoraTarget.QKV, LoraTarget.FC1))
        return norms + (attention + feed_forward) * width // self.axes.tensor + self._between_factors() * width

    def _keeps(self, target: LoraTarget) -> bool:
        """Whether a matrix's input is saved: for its own gradient, or for that of its adapter."""
        return self.lora is None or target in self.lora.targets

    def _between_factors(self) -> int:
        """Number of activations between the two factors of all adapters of a layer."""
        if self.lora is None:
            return 0
        split = self.axes.tensor if self.sequence_parallel else 1
        whole = sum(target in (LoraTarget.QKV, LoraTarget.FC1) for target in self.lora.targets)
        return self.lora.rank * whole + self.lora.rank * (len(self.lora.targets) - whole) // split

    def _norm(self, *, output_is_kept: bool) -> int:
        """Bytes of a norm: its input and output. Unfused norms work in fp32 and also save the normalized values, for the
        gradient of their weight."""
        width = 4 if self.precision is Precision.FP32 else 2
        saved = width if self.fused else 4 if self.lora is not None else 8
        split = self.axes.tensor if self.sequence_parallel else 1
        return self.arch.hidden_size * (saved + width * output_is_kept) // split
