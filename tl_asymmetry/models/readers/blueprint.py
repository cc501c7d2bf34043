"""How an architecture lays TransformerLens's matrices out in its stored parameters, found out by asking the library.

No table of ours: a model of one layer is built whose parameters hold their own row numbers (then column numbers)
instead of weights, TransformerLens wraps it, and every matrix of the wrapper shows which rows or columns of which
parameter it is made of. The parameters are expanded from one row or column, so a layer of any width costs next to
nothing, and what holds for loaded models holds for files, for every architecture the library knows.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import re
import threading
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_asymmetry.geometry.precision import product_dtype
from tl_asymmetry.models.huggingface import has_like_layers
from tl_asymmetry.models.loading import bridge_around
from tl_asymmetry.models.readers.files import in_short
from tl_asymmetry.models.readers.resolution import Resolution, resolve
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.names import kind_of

# Between the numbers of two parameters: Gemma's gains show 1 more than they hold.
_GAP = 4
_FLOAT32_INTEGERS = 2**24

_SAME_MATRICES = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
"""Language models inside multimodal ones that transformers has no class of their own for, and whose matrices theirs
are: they differ in the rotation of positions alone."""


@dataclass(frozen=True)
class Layout:
    """A matrix as rows or columns of a stored parameter of layer 0."""

    matrix: str
    """Name of the matrix, W_Q … W_out."""
    parameter: str
    """Name of the stored parameter."""
    residual_axis: int
    """Axis of the parameter that is d_model: 1 in a Linear that reads, 0 in GPT-2's Conv1D that reads."""
    index: Int[Tensor, "*place"]
    """Which row (or column) of the other axis: `[head, d_head]`, or `[d_mlp]`."""

    def take(self, parameter: Float[Tensor, "rows columns"]) -> Float[Tensor, "*head first second"]:
        """The matrix in TransformerLens orientation, out of its parameter; a view where the rows are contiguous."""
        rows = self.rows(parameter if self.residual_axis == 1 else parameter.mT)
        return rows.mT if kind_of(self.matrix).reads else rows

    def rows(self, other_first: Float[Tensor, "other width"]) -> Float[Tensor, "*place width"]:
        """The chosen rows of anything whose first axis is the parameter's other one (a factor of its change)."""
        flat = self.index.reshape(-1)
        first, count = int(flat[0]), len(flat)
        contiguous = bool((flat == torch.arange(first, first + count)).all())
        rows = other_first[first : first + count] if contiguous else other_first.index_select(0, flat)
        return rows.unflatten(0, self.index.shape)


@dataclass(frozen=True)
class Extra:
    """A parameter that is no matrix: a bias, a gain, an embedding, under HookedTransformer's name."""

    parameter: str | None
    """Name of the stored parameter (of layer 0); None for a bias that this architecture does not have."""
    index: Int[Tensor, "*place"] | None
    """For a bias, its entries' places in the stored one, or the shape of the missing one; None: ask the wrapper."""
    as_stored: bool = False
    """Whether the wrapper shows the parameter's own numbers, so that they need no more room than they are stored in."""


class Skeleton:
    """Names and shapes of every stored parameter of a configuration's language model, without any weights.

    Args:
        config: a transformers configuration of a causal language model, or of a multimodal one around it.

    Raises:
        ValueError: not that.
    """

    config: Any
    """The language model's own configuration."""
    architecture: str
    """Name of the model's class in transformers."""
    shapes: dict[str, tuple[int, ...]]
    """Every parameter of the whole model, by its name in transformers; of tied ones the first."""
    tied: dict[str, str]
    """Parameters that are another one's tensor, and that one."""
    head: frozenset[str]
    """Parameters of the unembedding."""
    conv1d: frozenset[str]
    """Parameters stored `[in, out]`."""
    n_layers: int
    """Number of blocks."""
    has_like_layers: bool
    """Whether all layers have the same matrices, and no experts."""

    def __init__(self, config: Any) -> None:
        self.config = config = language_model_config(config)
        self.n_layers = int(config.num_hidden_layers)
        whole = _on_meta(config)
        self.architecture = type(whole).__name__
        self.shapes = {name: tuple(p.shape) for name, p in whole.named_parameters()}
        self.tied = _ties(whole)
        heads = [name for name, module in whole.named_modules() if module is whole.get_output_embeddings()]
        self.head = frozenset(f"{name}.{leaf}" for name in heads for leaf in ("weight", "bias"))
        self.conv1d = frozenset(f"{n}.weight" for n, m in whole.named_modules() if type(m).__name__ == "Conv1D")
        self.has_like_layers = has_like_layers(whole)
        self.layer_list = _layer_list(whole, self.n_layers)
        self._rename = _renaming(whole)
        self._buffers = _ignored(whole)

    def at(self, name: str, layer: int) -> str:
        """The name of a layer-0 parameter in another layer."""
        prefix = f"{self.layer_list}.0."
        return f"{self.layer_list}.{layer}.{name.removeprefix(prefix)}" if name.startswith(prefix) else name

    def layer_of(self, name: str) -> int | None:
        """The layer that a parameter or module lies in by its name, whether there is such a layer or not."""
        found = re.match(rf"{re.escape(self.layer_list)}\.(\d+)\.", name)
        return int(found[1]) if found else None

    def meaning(self, name: str) -> tuple[str, bool] | None:
        """The parameter that a name in a checkpoint is by transformers' own rules for reading checkpoints, and whether
        it is converted on reading (experts that are stacked); None for none."""
        parameter, converted = self._rename(name)
        if parameter in self.shapes or parameter in self.tied:
            return parameter, converted
        return None

    def resolve(self, names: Iterable[str]) -> Resolution:
        """Sort the names of a checkpoint by the parameters that they mean; buffers that no model reads are dropped."""
        resolution = resolve(names, self.meaning)
        resolution.left = [name for name in resolution.left if not self._buffers.search(name)]
        return resolution


class Blueprint:
    """How TransformerLens's matrices lie in the stored parameters of a configuration's model.

    Args:
        skeleton: the parameters.

    Raises:
        ValueError: an architecture that TransformerLens cannot wrap, or that stores a matrix in no plain way.
    """

    view: ModelView
    """A wrapper around one layer without weights: dimensions, kind of norm, matrices."""
    layouts: dict[str, Layout]
    """By matrix."""
    extras: dict[str, Extra]
    """All that is no matrix, by HookedTransformer's name in layer 0."""

    def __init__(self, skeleton: Skeleton) -> None:
        self.skeleton = skeleton
        self.n_layers = skeleton.n_layers
        self._lock = threading.Lock()
        try:
            rows, columns = _Probe(skeleton.config, axis=0), _Probe(skeleton.config, axis=1)
        except NotImplementedError as error:  # it would have to be run, and there are no weights
            raise ValueError(
                f"expected an architecture whose matrices TransformerLens names in every layer, got "
                f"{skeleton.architecture}, which only a loaded model shows; pass the model loaded"
            ) from error
        self.view, self._parameters = columns.view, columns.parameters
        self.layouts = {matrix: _layout(matrix, rows, columns) for matrix in rows.view.matrices}
        self.extras = {name: _extra(name, maker, rows) for name, maker in rows.makers.items()}
        self._makers = columns.makers

    def parameter(self, layer: int, matrix: str) -> str:
        """The stored parameter that a matrix lies in."""
        return self.skeleton.at(self.layouts[matrix].parameter, layer)

    def matrices_in(self, parameter: str) -> Iterator[tuple[int, str]]:
        """The matrices that lie in a stored parameter: `(layer, matrix)`."""
        layer = self.skeleton.layer_of(parameter)
        if layer is not None and layer < self.n_layers:
            yield from ((layer, matrix) for matrix in self.layouts if self.parameter(layer, matrix) == parameter)

    def extras_in(self, parameter: str) -> Iterator[tuple[str, str]]:
        """The extras that lie in a stored parameter: `(name in layer 0, own name)`."""
        layer = self.skeleton.layer_of(parameter) or 0
        for name, extra in self.extras.items():
            if extra.parameter is not None and self.skeleton.at(extra.parameter, layer) == parameter:
                yield name, dict(self.everywhere(name)).get(layer, name)

    def everywhere(self, extra: str) -> list[tuple[int, str]]:
        """An extra's name in every layer, or the name alone for what lies in no layer: `(layer, name)`."""
        for prefix in ("blocks", self.skeleton.layer_list):
            if extra.startswith(f"{prefix}.0."):
                rest = extra.removeprefix(f"{prefix}.0.")
                return [(layer, f"{prefix}.{layer}.{rest}") for layer in range(self.n_layers)]
        return [(0, extra)]

    def stored(self, parameter: str, weight: Callable[[int, str], Tensor]) -> Tensor:
        """A stored parameter put together from its matrices; the inverse of `Layout.take`.

        Args:
            parameter: its name.
            weight: gives a matrix in TransformerLens orientation.

        Raises:
            ValueError: a parameter with rows that belong to no matrix.
        """
        whole, filled = None, 0
        for layer, matrix in self.matrices_in(parameter):
            layout, W = self.layouts[matrix], weight(layer, matrix).detach()
            rows = W.mT if kind_of(matrix).reads else W  # d_model last
            if whole is None:
                whole = torch.empty(self.skeleton.shapes[parameter], dtype=product_dtype(W))
            other_first = whole if layout.residual_axis == 1 else whole.mT
            other_first[layout.index.reshape(-1)] = rows.reshape(-1, rows.shape[-1]).to(whole)
            filled += layout.index.numel()
        if whole is None or filled * self.view.d_model != whole.numel():
            raise ValueError(
                f"expected {parameter} to consist of the matrices that are analysed, got others in it as well; pass "
                "the merged model (merge_and_unload, save_pretrained)"
            )
        return whole

    def extra(self, name: str, parameter: Tensor | None) -> Tensor:
        """The value of an extra parameter from the stored one, with HookedTransformer's conventions."""
        entry = self.extras[name]
        if entry.index is not None:
            if parameter is None:
                return torch.zeros(entry.index.shape)
            return parameter[entry.index]
        if parameter is None:
            raise RuntimeError(f"{name} was asked for without its stored parameter")
        own = self._parameters[str(entry.parameter)]
        with self._lock:
            kept = own.data
            try:
                own.data = parameter
                value = self._makers[name]().detach()
            finally:
                own.data = kept
        return value


def skeleton_of(config: Any, name: str) -> Skeleton:
    """The skeleton of a configuration; the last few are kept, for checkpoints and adapters come in rows.

    Args:
        config: the configuration.
        name: whose it is, for messages.

    Raises:
        ValueError: no configuration of a causal language model.
    """
    try:
        return _skeleton(_kind(config), _described(config))
    except ValueError as error:
        raise ValueError(f"{error} (the configuration of {name!r})") from error


def blueprint_of(config: Any) -> Blueprint:
    """The blueprint of a configuration; kept as its skeleton is."""
    return _blueprint(_kind(config), _described(config))


def _kind(config: Any) -> Any:
    return type(config)


@functools.lru_cache(maxsize=16)
def _skeleton(kind: Hashable, described: str) -> Skeleton:
    configuration: Any = kind
    return Skeleton(configuration.from_dict(json.loads(described)))


@functools.lru_cache(maxsize=16)
def _blueprint(kind: Hashable, described: str) -> Blueprint:
    return Blueprint(_skeleton(kind, described))


def _described(config: Any) -> str:
    """What of a configuration its architecture depends on: neither where it is from nor how weights are packed."""
    document = config.to_dict()
    for name in ("_name_or_path", "quantization_config"):
        document.pop(name, None)
    return json.dumps(document, sort_keys=True, default=str)


def language_model_config(config: Any) -> Any:
    """The configuration of the language model inside a multimodal one; any other as it is."""
    text = config.get_text_config()
    if text is config:
        return config
    text = copy.deepcopy(text)
    if text.model_type in _SAME_MATRICES:
        from transformers import AutoConfig

        sizes = {name: value for name, value in text.to_dict().items() if name not in ("model_type", "rope_parameters")}
        text = AutoConfig.for_model(_SAME_MATRICES[text.model_type], **sizes)
    text.tie_word_embeddings = config.tie_word_embeddings  # what counts is the outer one's
    return text


def untied(config: Any) -> Any:
    """The same configuration with an unembedding of its own."""
    config = copy.deepcopy(language_model_config(config))
    config.tie_word_embeddings = False
    return config


class _Probe:
    """A one-layer model in TransformerLens's wrapper whose parameters hold the numbers of their rows or columns."""

    def __init__(self, config: Any, *, axis: int) -> None:
        skeleton = _on_meta(_one_layer(config))
        self.parameters: dict[str, nn.Parameter] = {}
        self._ranges: dict[str, range] = {}
        start = 1
        for name, parameter in list(skeleton.named_parameters()):
            if start + max(parameter.shape) > _FLOAT32_INTEGERS:
                raise ValueError(
                    f"expected fewer than {_FLOAT32_INTEGERS} rows and columns in a layer and its embeddings, got "
                    f"{tuple(parameter.shape)} for {name}; pass the configuration that belongs to the weights"
                )
            numbered, count = _numbered(parameter.shape, axis, start)
            self._ranges[name] = range(start, start + count)
            start += count + _GAP
            owner, _, leaf = name.rpartition(".")
            self.parameters[name] = nn.Parameter(numbered, requires_grad=False)
            setattr(skeleton.get_submodule(owner), leaf, self.parameters[name])
        skeleton.tie_weights()
        self.view = ModelView(_wrapped(skeleton))
        self.makers = self.view._adapter.headless()

    def source(self, values: Tensor) -> str | None:
        """The parameter whose numbers these are (or those numbers + 1); None if they are no one parameter's."""
        low, high = values.detach().aminmax()
        of = (name for name, numbers in self._ranges.items() if numbers.start <= low and high <= numbers.stop)
        return next(of, None)

    def numbers(self, values: Tensor, name: str) -> Tensor:
        """Values as row (or column) numbers of a parameter."""
        return (values - self._ranges[name].start).long()


def _numbered(shape: torch.Size, axis: int, start: int) -> tuple[Tensor, int]:
    """A tensor of that shape holding its row numbers (axis 0) or column numbers from `start` on, and their count."""
    if len(shape) > 2:  # experts: only where they are matters
        return torch.full((1,) * len(shape), float(start)).expand(shape), 1
    axis = min(axis, len(shape) - 1)
    numbers = torch.arange(start, start + shape[axis], dtype=torch.float32)
    return (numbers if len(shape) == 1 else numbers.unsqueeze(1 - axis).expand(shape)), shape[axis]


def _layout(matrix: str, rows: _Probe, columns: _Probe) -> Layout:
    """Read a matrix's layout off the two wrappers."""
    row_values, column_values = (probe.view._weight(0, matrix) for probe in (rows, columns))
    name = rows.source(row_values)
    if name is not None:
        r, c = rows.numbers(row_values, name), columns.numbers(column_values, name)
        if kind_of(matrix).reads:
            r, c = r.mT, c.mT  # d_model last
        along = torch.arange(r.shape[-1])
        for residual_axis, (near, far) in ((1, (c, r)), (0, (r, c))):
            if bool((near == along).all()) and bool((far == far[..., :1]).all()):
                return Layout(matrix, name, residual_axis, far[..., 0].clone())  # no view: it would keep all of r or c
    raise ValueError(
        f"expected {matrix} to be rows or columns of one stored parameter, got something else in this architecture "
        f"({type(rows.view.model.original_model).__name__}); pass a loaded model"
    )


def _extra(name: str, maker: Callable[[], Tensor], rows: _Probe) -> Extra:
    value = maker().detach()
    if name.rpartition(".")[2].startswith("b_"):
        source = rows.source(value) if bool(value.any()) else None
        index = torch.zeros(value.shape, dtype=torch.int64) if source is None else rows.numbers(value, source)
        return Extra(source, index)
    scaled = name == "embed.W_E" and _address(value) != _address(rows.view._adapter.embedding())
    if scaled:  # Gemma's
        value = rows.view._adapter.embedding()
    same = [n for n, p in rows.parameters.items() if _address(p) == _address(value)]
    return Extra(same[0] if same else rows.source(value), None, as_stored=bool(same) and not scaled)


def _wrapped(model: Any) -> Any:
    model.config.architectures = [type(model).__name__]  # that of a multimodal model would be the whole's
    with _quiet():
        return bridge_around(model, "skeleton")


def _on_meta(config: Any) -> Any:
    """The model of a configuration without its weights."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"expected the configuration of a causal language model, got {type(config).__name__}; pass a model "
            "directory of a supported architecture"
        )
    with _quiet(), torch.random.fork_rng(devices=[]), torch.device("meta"):
        try:
            return AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
            )
        except Exception as error:  # whatever a model's own code makes of numbers that do not fit
            raise ValueError(
                f"expected the configuration of a causal language model, got {type(config).__name__} "
                f"({in_short(error)}); pass a model directory of a supported architecture"
            ) from error


def _one_layer(config: Any) -> Any:
    single = copy.deepcopy(config)
    layers = config.num_hidden_layers
    for name, value in list(vars(single).items()):
        if isinstance(value, list) and len(value) == layers:  # kinds of layers, one entry for each
            setattr(single, name, value[:1])
    single.num_hidden_layers = 1
    return single


def _layer_list(model: nn.Module, layers: int) -> str:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            return name
    raise ValueError(f"expected a list of {layers} layers in {type(model).__name__}, got none; pass a loaded model")


def _ties(model: Any) -> dict[str, str]:
    """Names under which a parameter is listed a second time."""
    first: dict[int, str] = {}
    ties = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            ties[name] = first[id(parameter)]
        first.setdefault(id(parameter), name)
    return ties


def _renaming(model: Any) -> Callable[[str], tuple[str, bool]]:
    """What transformers calls a tensor of a checkpoint, and whether it would convert it."""
    known = model.state_dict()
    prefix = model.base_model_prefix
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # transformers before 5 knows no such rules
        return lambda name: (_with_prefix(name, prefix, known), False)
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    def rename(name: str) -> tuple[str, bool]:
        renamed, converter = rename_source_key(name, renamings, converters, prefix, known)
        if renamed not in known and name in known:
            return name, False
        return renamed, converter is not None

    return rename


def _with_prefix(name: str, prefix: str, known: Mapping[str, Any]) -> str:
    for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        if candidate in known:
            return candidate
    return name


def _ignored(model: Any) -> re.Pattern[str]:
    """Names of buffers and remnants that transformers reads past without a word."""
    buffers = [rf"{re.escape(name)}$" for name, _ in model.named_buffers()]
    old = (r"rotary_emb\.inv_freq$", r"\.masked_bias$", r"\.(attn|attention)\.bias$")
    return re.compile("|".join([*buffers, *old]))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextlib.contextmanager
def _quiet() -> Any:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
