"""The ground floor: kinds of matrices and their thresholds, written down once."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import tl_asymmetry
from tl_asymmetry import names
from tl_asymmetry.names import MATRICES, POINTS, kind_of, side_by_name

PACKAGE = Path(tl_asymmetry.__file__).parent


def test_results_list_matrices_in_this_order() -> None:
    order = ["W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out"]
    assert [name for name in MATRICES if name in order] == order
    assert names.ATTENTION == ("W_Q", "W_K", "W_V", "W_O")


@pytest.mark.parametrize("name", MATRICES)
def test_each_kind_is_whole(name: str) -> None:
    kind = kind_of(name)
    assert kind.name == name
    assert kind.point in POINTS
    assert kind.reads != kind.writes
    assert kind.subspace == (kind.point if kind.reads else "prediction")
    assert {kind.input_axis, kind.output_axis} == {"residual", "head" if kind.heads else kind.part}
    assert (kind.input_axis if kind.reads else kind.output_axis) == "residual"
    assert kind.heads is None or kind.part == "attn"


def test_a_further_map_has_the_side_it_is_given() -> None:
    out = kind_of("vision.squeeze", "write")
    assert (out.part, out.subspace, out.output_axis, out.heads) == ("vision", "prediction", "residual", None)
    assert kind_of("vision.expand", "read").input_axis == "residual"
    with pytest.raises(ValueError, match="or the side"):
        kind_of("vision.expand")
    assert kind_of("W_O", "read").side == "write"  # its own
    with pytest.raises(ValueError, match="expected a matrix among W_Q, .*, got 'WQ'; pass one of these, or the side"):
        kind_of("WQ")


@pytest.mark.parametrize(
    ("path", "side", "point"),
    [("linear_attn.in_proj_qkv", "read", "attn_in"), ("mamba.in_proj", "read", "attn_in"),
     ("mlp.shared_expert_gate", "read", "mlp_in"), ("conv.out_proj", "write", "conv.out_proj"),
     ("temporal_block.linear_y", "read", "attn_in"), ("per_layer_input_gate", "read", "per_layer_input_gate"),
     ("feed_forward.value", "write", "feed_forward.value"), ("attention.value", "read", "attention.value")],
)  # fmt: skip
def test_a_further_map_says_its_side_by_its_name(path: str, side: str, point: str) -> None:
    kind = kind_of(path)
    assert (kind.side, kind.point) == (side, point)
    assert side_by_name(path) == side


@pytest.mark.parametrize("path", ["mixer.x_proj", "mixer.dt_proj", "self_attn.kv_b_proj", "self_attn.q_b_proj", "wq_b"])
def test_a_map_between_latents_has_no_side_on_the_stream(path: str) -> None:
    assert side_by_name(path) is None


def test_a_threshold_is_written_down_once() -> None:
    """No module assigns a level of its own under a name that means one of these."""
    word = re.compile(r"SIGNIFICANT|LEVEL|EIGENGAP|ROUNDING_(FLAG|DOM)|SMALLEST_EIGENVALUE")
    again = [
        f"{path.name}: {target.id}"
        for path in PACKAGE.rglob("*.py")
        if path.name != "names.py"
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name) and word.search(target.id)
    ]
    assert not again


def imported(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports anywhere, also inside a function or for the type checker alone."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tl_asymmetry"):
            for alias in node.names:
                module = PACKAGE.parent.joinpath(*f"{node.module}.{alias.name}".split("."))
                inside = module.is_dir() or module.with_suffix(".py").exists()
                yield f"{node.module}.{alias.name}" if inside else str(node.module)


def test_no_file_imports_itself_by_way_of_another() -> None:
    """Packages list what is in them (`__init__`), so they count as what they import from."""
    files = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    graph = {name: {module for module in imported(path) if module != name} for name, path in files.items()}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(files)
