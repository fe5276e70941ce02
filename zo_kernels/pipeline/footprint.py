"""How much memory the activations of a forward, and of a backward, take at their peak.

The model of it, per decoder block; all formulas are bytes, checked against measured peaks:

    B sequences of T tokens, N = B T; C completion tokens of each, M = B C
    H hidden width, Q and K width of all query and all key heads, F inner width of the MLP,
    V vocabulary, h heads
    e bytes of a weight, a bytes of what linears give (2 under autocast, else e), g of a gradient

Forward without gradients. Beside a block's own tensors live the embeddings that went in (N H), the
block's input (N H), the mask (B T^2, if B > 1) and, in the MLP, the residual (N H):

    norm        N (3 e H + 8 H): the square and the product in float32   (LayerNorm: N e 4 H)
    rotation    N a (3 H + Q + 2 K + max(3 Q, Q + 3 K))                  (models with rotation)
    attention   N a (3 H + 2 Q + 2 K), sdpa;
                + N a 2 Q where keys and values are repeated: fewer key heads and B > 1 (padding)
                + B T^2 a for the mask as numbers, if B > 1; eager: + B h T^2 (4 + 2 a)
    MLP         N a (4 H + 3 F), gated (gate and up fused: 4 F); plain: 2 F, an activation composed
                of torch functions: 4 F
    head        N e H + M (e H + a V): the last hidden states, those at completions, the logits
    loss        M V (a + 4 + 4), 4 less if a = 4: logits, in float32, their log-softmax

The peak of a forward is the largest of these. A dual step adds what the other evaluation keeps
while it waits: N a (4 H + F).

Kept for the backward:

    block       norms, per width W: 12 W in float32 (input, normalised, output), 8 W in 16 bits
                (4 + 2 + 2), LayerNorm 2 e W; under autocast 8 W, and 2 H for each linear's input
                attention a (2 Q + 2 K), with keys and values repeated a 4 Q; + a B T^2 if B > 1
                MLP a 4 F, gated; plain 2 F, ReLU 1 F; composed 5 F
                all times N
    head        4 M V, the log-softmax

Gradients come as activations go, so the peak of a backward is the largest of: its beginning (all
that is kept, and 8 M V of gradients more); its end (all gradients, what one block kept, N a (3 F +
2 H) of gradients within it); after it (all gradients; of a tied table two parts and their sum,
under autocast two in all). Autocast's copies of weights go as activations do.

Not modelled: the allocator's fragments, workspaces of the matrix products, rotation tables.
"""

from __future__ import annotations

from dataclasses import dataclass

from zo_kernels.pipeline.shapes import BlockShape, ModelShape


@dataclass(frozen=True)
class Work:
    """What one evaluation of the loss reads.

    Attributes:
        rows: sequences in a batch.
        length: tokens of each, padding included.
        completion: tokens of each whose losses are taken.
        weight_bytes: of one weight.
        output_bytes: of one element that a linear gives: 2 under autocast.
    """

    rows: int
    length: int
    completion: int
    weight_bytes: int
    output_bytes: int

    @property
    def tokens(self) -> int:
        """Tokens of a batch."""
        return self.rows * self.length

    @property
    def positions(self) -> int:
        """Positions of a batch that have logits."""
        return self.rows * self.completion

    @property
    def masked(self) -> bool:
        """Whether sequences of different lengths are padded, so that attention has a mask."""
        return self.rows > 1

    @property
    def autocast(self) -> bool:
        """Whether linears give another dtype than the weights'."""
        return self.output_bytes != self.weight_bytes


def forward_peak(shape: ModelShape, work: Work, *, dual: bool = False) -> int:
    """Bytes of activations at the peak of one forward without gradients; of two in step."""
    blocks = list(shape.blocks.values())
    hidden = max(block.hidden for block in blocks)
    logits = work.positions * shape.vocabulary
    in_float32 = 4 if work.output_bytes < 4 else 0
    peak = max(
        *(_block_peak(shape, block, work) for block in blocks),
        work.weight_bytes * hidden * (work.tokens + work.positions) + logits * work.output_bytes,
        logits * (work.output_bytes + in_float32 + 4),
    )
    waiting = max(4 * block.hidden + block.inner for block in blocks)
    return peak + (work.tokens * work.output_bytes * waiting if dual else 0)


def _block_peak(shape: ModelShape, block: BlockShape, work: Work) -> int:
    e, a, n = work.weight_bytes, work.output_bytes, work.tokens
    hidden, query, key, inner = block.hidden, block.query, block.key, block.inner
    norm = n * hidden * (3 * e + 8 if shape.root_mean_square else 4 * e)
    rotation = 0
    if shape.rotary:
        rotation = n * a * (3 * hidden + query + 2 * key + max(3 * query, query + 3 * key))
    attention = n * a * (3 * hidden + 2 * query + 2 * key) + _attention_extra(shape, work)
    if _repeated(block, work):
        attention += n * a * 2 * query
    if block.gated:
        mlp = n * a * (4 * hidden + (4 if block.fused else 3) * inner)
    else:
        mlp = n * a * (4 * hidden + (4 if shape.composed else 2) * inner)
    mask = work.rows * work.length**2 if work.masked else 0
    return max(norm, rotation, attention, mlp) + mask


def _repeated(block: BlockShape, work: Work) -> bool:
    return block.key < block.query and work.masked


def _attention_extra(shape: ModelShape, work: Work) -> int:
    """The mask as numbers, and the probabilities where attention keeps them."""
    square = work.rows * work.length**2
    mask = square * work.output_bytes if work.masked else 0
    return mask + (square * shape.heads * (4 + 2 * work.output_bytes) if shape.eager else 0)


def kept_by_block(shape: ModelShape, block: BlockShape, work: Work) -> int:
    """Bytes that the backward of one decoder block needs of its forward."""
    e, a = work.weight_bytes, work.output_bytes
    if work.autocast:
        norms = 8 * block.norms if shape.root_mean_square else 4 * block.norms
        norms += a * block.hidden * block.linears
    elif shape.root_mean_square:
        norms = (12 if e == 4 else 8) * block.norms
    else:
        norms = 2 * e * block.norms
    attention = a * (4 * block.query if _repeated(block, work) else 2 * (block.query + block.key))
    mlp = a * block.inner * (4 if block.gated else shape.kept_by_activation)
    square = work.rows * work.length**2
    mask = a * square if work.masked else 0
    probabilities = square * shape.heads * (4 + a) if shape.eager else 0
    return work.tokens * (norms + attention + mlp) + mask + probabilities


@dataclass(frozen=True)
class BackwardPeak:
    """What a backward holds at its peak, in bytes.

    Attributes:
        activations: and their gradients.
        copies: that autocast made of weights.
        gradients: of weights.
    """

    activations: int
    copies: int
    gradients: int


def backward_peak(shape: ModelShape, work: Work, gradient_bytes: int) -> BackwardPeak:
    """The largest moment of a forward with gradients and its backward.

    Args:
        gradient_bytes: of one weight's gradient.
    """
    blocks = list(shape.blocks.values())
    kept = [kept_by_block(shape, block, work) for block in blocks]
    logits = work.positions * shape.vocabulary
    table = shape.vocabulary * blocks[0].hidden
    outputs = work.tokens * work.output_bytes
    within = max(outputs * (3 * block.inner + 2 * block.hidden) for block in blocks)
    cast = work.output_bytes if work.autocast else 0
    copies = [cast * block.linear_weights for block in blocks]
    g = gradient_bytes
    again = 0 if not shape.tied else 1 if work.autocast else 2
    before_end = shape.elements - (0 if shape.tied else table)
    return max(
        BackwardPeak(sum(kept) + 12 * logits, sum(copies) + cast * table, 0),
        BackwardPeak(sum(kept) + within, sum(copies), g * (table + blocks[-1].weights)),
        BackwardPeak(kept[0] + within, copies[0], g * before_end),
        BackwardPeak(0, 0, g * (shape.elements + again * table)),
        key=lambda moment: moment.activations + moment.copies + moment.gradients,
    )
