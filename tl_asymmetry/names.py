"""The ground floor: the kinds of weight matrix, the points of a block, and the thresholds, each written down once.

A matrix is known by its name: "W_Q", or the path of its module inside the block where TransformerLens has no name for
it. `kind_of` says what is true of it wherever it stands: which of its axes is the residual one, where its exact input
is seen, whose heads it has. The experts of a mixture are of the kind of the dense matrix of that name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Integral
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeAlias

SIGNIFICANT = 0.05
"""Level of every test: what p, or q where there are several tests, may be at most."""

FOUND = f"q ≤ {SIGNIFICANT}"
"""How every page, figure and sentence says that a test found something."""

SMALL_EIGENGAP = 0.05
"""Relative eigengap at a subspace's edge under which that edge is arbitrary."""

ROUNDING_FLAGGED = 0.1
"""Rounding share from which a head is marked."""

ROUNDING_DOMINATED = 0.5
"""Rounding share from which storage explains more of a delta than training does, so that a head is greyed out."""

SMALLEST_EIGENVALUE = 1e-6
"""Share of the leading eigenvalue under which a direction does not exist."""

POINTS: tuple[str, ...] = (
    "attn_in", "mlp_in", "resid_pre", "resid_mid", "resid_post", "z", "mlp_post", "mlp_post_shared", "q_latent",
    "kv_latent",
)  # fmt: skip
"""Places in a block whose tensors `ModelView.hooks` gives to readers."""

LATENTS: tuple[str, ...] = ("q_latent", "kv_latent")
"""Those of them where latent attention holds its narrow query, and its key and value: behind the latent's norm."""

BASIS_METHODS = MappingProxyType({"pca": "PCA", "semi_nmf": "semi-NMF"})
"""How a basis can be taken from activations, and what that is called in words."""

PREDICTION = "prediction"
"""The subspace that the unembedding defines."""

ROUTING = "routing"
"""What a mixture's router decides: seen beside the points, in layers with experts."""

EXPERT_INPUT = "expert_in"
"""The subspace of an expert's own inputs: of the tokens that are routed to it."""


def expert_input(expert: int) -> str:
    """The name under which the moments of one expert's inputs are kept.

    Example:
        >>> expert_input(12)
        'expert_in:12'
    """
    return f"{EXPERT_INPUT}:{expert}"


Side = Literal["read", "write"]


@dataclass(frozen=True)
class MatrixKind:
    """What is true of a matrix in every layer of every model."""

    name: str
    """Its name: TransformerLens's, or its module's path inside the block."""
    side: Side
    """"read": the residual stream is its input axis; "write": its output axis."""
    point: str
    """Where its exact input is seen: one of `POINTS`, or for a further linear map its own name."""
    part: str
    """The part of the block that it belongs to: "attn" (attention or another mixer of tokens), "mlp", or the first
    element of a further linear map's path."""
    heads: Literal["query", "kv"] | None = None
    """Whose heads it is split into; None for a matrix without heads."""

    @property
    def reads(self) -> bool:
        """Whether it reads from the residual stream."""
        return self.side == "read"

    @property
    def writes(self) -> bool:
        """Whether it writes into the residual stream."""
        return self.side == "write"

    @property
    def latent(self) -> bool:
        """Whether what it reads is a latent and not the residual stream: in what is said of the stream, such a matrix
        is held against its latent instead (W_UQ, W_UK and W_UV of latent attention)."""
        return self.point in LATENTS

    @property
    def subspace(self) -> str:
        """The subspace that it is first held against: its own input (read), what the model predicts with (write)."""
        return self.point if self.reads else PREDICTION

    @property
    def input_axis(self) -> str:
        """What its input axis is: "residual", or what a write matrix writes from, "head" or "mlp"."""
        return "residual" if self.reads else self._inner_axis

    @property
    def output_axis(self) -> str:
        """What its output axis is: "residual", or what a read matrix fills, "head" or "mlp"."""
        return "residual" if self.writes else self._inner_axis

    @property
    def _inner_axis(self) -> str:
        return "head" if self.heads else self.part


MATRICES: MappingProxyType[str, MatrixKind] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            MatrixKind("W_Q", "read", "attn_in", "attn", "query"),
            MatrixKind("W_K", "read", "attn_in", "attn", "kv"),
            MatrixKind("W_V", "read", "attn_in", "attn", "kv"),
            MatrixKind("W_O", "write", "z", "attn", "query"),
            MatrixKind("W_attn_gate", "read", "attn_in", "attn", "query"),
            MatrixKind("W_DQ", "read", "attn_in", "attn"),
            MatrixKind("W_UQ", "read", "q_latent", "attn", "query"),
            MatrixKind("W_DKV", "read", "attn_in", "attn"),
            MatrixKind("W_UK", "read", "kv_latent", "attn", "query"),
            MatrixKind("W_UV", "read", "kv_latent", "attn", "query"),
            MatrixKind("W_KR", "read", "attn_in", "attn"),
            MatrixKind("W_in", "read", "mlp_in", "mlp"),
            MatrixKind("W_gate", "read", "mlp_in", "mlp"),
            MatrixKind("W_out", "write", "mlp_post", "mlp"),
            MatrixKind("W_router", "read", "mlp_in", "mlp"),
            MatrixKind("W_in_shared", "read", "mlp_in", "mlp"),
            MatrixKind("W_gate_shared", "read", "mlp_in", "mlp"),
            MatrixKind("W_out_shared", "write", "mlp_post_shared", "mlp"),
        )
    }
)
"""The matrices that have a name, in the order in which results list them: those of every transformer, the output gate
and the latents of newer attentions, a mixture's router and shared experts.

Of latent attention W_DQ, W_DKV and W_KR read the stream; W_UQ, W_UK and W_UV read the latents that the first two
fill."""

ATTENTION: tuple[str, ...] = ("W_Q", "W_K", "W_V", "W_O")
"""Names of the matrices that every attention with heads has, in that order."""

KEYS_AND_VALUES: tuple[str, ...] = ("W_K", "W_V", "W_DKV", "W_UK", "W_UV", "W_KR")
"""Names of the matrices that keys and values come from, which have gradients at every position, the first included."""

_FURTHER_WRITES = re.compile(
    r"(.*\.)?((out|o|o_b|output)_proj|linear_out|linear_right|per_layer_projection|proj_down)"
    r"|attention\.output|feed_forward\.value"
)
_FURTHER_READS = re.compile(
    r"(.*\.)?(in_proj\w*|linear_[xy]|linear_left|\w*_gate|[abgqkvz]_proj|kv_proj|gate_proj|wk|weights_proj"
    r"|modality_router|[if]gate_preact|ogate_preact|proj_up(_gate)?|mlstm_layer\.[qkv])"
    r"|attention\.(key|value|receptance)|feed_forward\.(key|receptance)"
)
_MIXERS = re.compile(r"(.*\.)?(linear_attn|mamba|conv|mixer|temporal_block|self_attn|self_attention)\..*")
"""Paths inside what mixes tokens and reads one tensor: what attention's place in the layer is given to."""


def side_by_name(path: str) -> Side | None:
    """Which side of a further linear map is the residual stream's, by the path of its module; None where it is unknown.

    Example:
        >>> side_by_name("mamba.in_proj"), side_by_name("mamba.out_proj"), side_by_name("mamba.x_proj")
        ('read', 'write', None)
    """
    if _FURTHER_WRITES.fullmatch(path):
        return "write"
    return "read" if _FURTHER_READS.fullmatch(path) else None


def kind_of(matrix: str, side: Side | None = None) -> MatrixKind:
    """What is true of a matrix, by its name.

    Args:
        matrix: a name of `MATRICES`, or the module path of a further linear map.
        side: of a further linear map, where its name does not say it.

    Raises:
        ValueError: a name that is not in `MATRICES`, without its side.

    Example:
        >>> kind_of("W_O").side, kind_of("W_O").point
        ('write', 'z')
        >>> kind_of("linear_attn.in_proj_qkv").subspace, kind_of("linear_attn.out_proj").side
        ('attn_in', 'write')
        >>> kind_of("altup.modality_router").subspace
        'altup.modality_router'
    """
    if matrix in MATRICES:
        return MATRICES[matrix]
    side = side or side_by_name(matrix)
    if side is None:
        raise ValueError(
            f"expected a matrix among {', '.join(MATRICES)}, got {matrix!r}; pass one of these, or the side of a "
            "further linear map"
        )
    part = "attn" if _MIXERS.fullmatch(matrix) else matrix.partition(".")[0]
    shared = {"attn": "attn_in", "mlp": "mlp_in"} if side == "read" else {}
    return MatrixKind(matrix, side, shared.get(part, matrix), part)


def reads_latent(matrix: str) -> bool:
    """Whether a matrix reads a latent and not the residual stream.

    Example:
        >>> reads_latent("W_UK"), reads_latent("W_DKV"), reads_latent("mamba.in_proj")
        (True, False, False)
    """
    return matrix in MATRICES and MATRICES[matrix].latent


def canonical(matrices: Collection[str]) -> tuple[str, ...]:
    """Names in the order in which results list them: those of `MATRICES`, then further linear maps as they come.

    Example:
        >>> canonical(["mamba.in_proj", "W_O", "W_Q"])
        ('W_Q', 'W_O', 'mamba.in_proj')
    """
    further = [matrix for matrix in matrices if matrix not in MATRICES]
    return (*(matrix for matrix in MATRICES if matrix in matrices), *further)


def thresholds() -> dict[str, float]:
    """The thresholds by name, for a page's script.

    Example:
        >>> thresholds()["significant"]
        0.05
    """
    return {
        "significant": SIGNIFICANT,
        "small_eigengap": SMALL_EIGENGAP,
        "rounding_flagged": ROUNDING_FLAGGED,
        "rounding_dominated": ROUNDING_DOMINATED,
    }


class Place(NamedTuple):
    """One matrix of a model: a head's, an expert's, or a whole layer's.

    Example:
        >>> str(Place(7, "W_Q", 3)), str(Place(7, "W_in"))
        ('L7H3.W_Q', 'L7.W_in')
    """

    layer: int
    """Which block."""
    matrix: str
    """Its name, as in `MATRICES`."""
    head: int | None = None
    """Which head; None for a matrix without heads."""
    expert: int | None = None
    """Which expert; None outside mixtures."""

    def __str__(self) -> str:
        head = "" if self.head is None else f"H{self.head}"
        expert = "" if self.expert is None else f"E{self.expert}"
        return f"L{self.layer}{head}{expert}.{self.matrix}"


PlaceLike: TypeAlias = str | Sequence[Any]
"""How a place may be said: "L7H3.W_Q", "L7.W_in", "L7E12.W_in", or (layer, matrix, head)."""

_SPELLED = re.compile(r"L(\d+)(?:H(\d+)|E(\d+))?\.(\w[\w.]*)")


def place_of(place: PlaceLike) -> Place:
    """A place however it is said: spelled, or in the order layer, matrix, head (or none), expert (or none).

    Raises:
        ValueError: something else.

    Example:
        >>> place_of("L7H3.W_Q") == place_of((7, "W_Q", 3))
        True
        >>> place_of("L7E12.W_in").expert
        12
    """
    if isinstance(place, str):
        found = _SPELLED.fullmatch(place)
        if found is not None:
            layer, head, expert = (None if number is None else int(number) for number in found.groups()[:3])
            return Place(int(layer or 0), found[4], head, expert)
    elif isinstance(place, Sequence) and 2 <= len(place) <= 4:
        parts: list[Any] = list(place)
        if (
            isinstance(parts[0], Integral)
            and isinstance(parts[1], str)
            and all(n is None or isinstance(n, Integral) for n in parts[2:])
        ):
            return Place(int(parts[0]), parts[1], *(None if n is None else int(n) for n in parts[2:]))
    raise ValueError(f'expected a place, got {place!r}; pass "L7H3.W_Q", "L7.W_in" or (layer, matrix, head)')


def whole_place(place: PlaceLike, head: int | None) -> Place:
    """A place that may be spelled whole, when no head is said beside it.

    Raises:
        ValueError: a place that is none; a spelled one with a head beside it.
    """
    if isinstance(place, str) and head is not None:
        raise ValueError(f"expected a whole place or its parts, got {place!r} and head={head}; pass one of the two")
    return place_of(place)


def counted(number: int, noun: str) -> str:
    """So many of something.

    Example:
        >>> counted(1, "site"), counted(2, "batch")
        ('1 site', '2 batches')
    """
    ending = "" if number == 1 else "es" if noun.endswith("ch") else "s"
    return f"{number} {noun}{ending}"


def nearest(given: object, available: Collection[str]) -> str:
    """The valid name that a wrong one was meant for, as a message says it, or "one of these".

    Example:
        >>> nearest("WQ", ["W_Q", "W_K"]), nearest("attention", ["W_Q", "W_K"])
        ("'W_Q'", 'one of these')
    """
    plain = {name.replace("_", "").casefold(): name for name in available}
    found = get_close_matches(str(given).replace("_", "").casefold(), plain, n=1, cutoff=0.75)
    return repr(plain[found[0]]) if found else "one of these"
