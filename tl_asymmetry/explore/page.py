"""Write the explorer's page: the data, plotly.js, and a script that shows them; no network, no server."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from tl_asymmetry.arguments import checked, shown
from tl_asymmetry.explore.pack import Pack
from tl_asymmetry.geometry.precision import with_fresh_settings
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.pair.data import PairData
from tl_asymmetry.pair.lookups import find_directions
from tl_asymmetry.results.pages import Html, document, page_path, title_markup, write_page
from tl_asymmetry.spectra.result import SpectralAnalysis

SCRIPT = ("data", "state", "words", "search", "map", "cards", "charts", "details", "spectra", "table", "wiring")
"""Parts of the page's script, in order: each a file under `script`, all in one scope."""
NEAREST_TOKENS = 6
CONTEXTS = 3
MOST_DIRECTIONS = 5


@checked
@with_fresh_settings
def explorer(
    result: PairData,
    path: str | Path,
    *,
    model: Any = None,
    directions: int = 3,
    edits: Any = None,
    rewinding: Any = None,
    trajectory: Any = None,
    spectra: SpectralAnalysis | None = None,
    progress: bool = True,
) -> Path:
    """Write the head explorer of a pair: one self-contained page that opens offline. Returns its path.

    A click on a head of the map (or Enter on it) opens its rank curve against both nulls, the spectrum of its delta,
    its leading directions with the nearest tokens and the contexts that excite them, and its edits, rewinding,
    trajectory and place in the base weight's own frame if given. Heads and experts can be searched, sorted, filtered,
    set side by side and downloaded as CSV (every column, in single precision); curves, spectra and directions are held
    in the digits that the page shows. The page's address (`#L7H3/W_Q`, `#L7E12/W_in`) restores what is open and chosen,
    and where the reader was.

    Args:
        result: what `analyze_pair` returned.
        path: the HTML file; its folder must exist, an existing file is replaced.
        model: the base model, for directions; None: the one that was analysed, if it still exists, else the page
            says that directions are missing.
        directions: how many leading directions of each head to look up (one pass over the calibration tokens and the
            whole vocabulary), at most 5; 0 leaves them out.
        edits, rewinding, trajectory: what `rank_one_study`, `rewind_study` and `analyze_trajectory` returned, or a
            DataFrame with the columns layer, head (missing for an MLP matrix) and matrix (or `matrices`, several in one
            cell). Its rows are shown with the head they belong to; with the columns `step` and `relative` they are
            drawn too.
        spectra: what `analyze_spectra` returned of the same two models: each head's share in the base weight's own
            singular directions, over chance, with intruders and rotation.
        progress: show a bar while directions are looked up.

    Raises:
        ValueError: another model than the one analysed, a table without these columns, a path that cannot be written.

    Example:
        >>> explorer(result, "explorer.html", model=base, progress=False)
        PosixPath('explorer.html')
    """
    from tl_asymmetry.explore import contents  # here, since both bring plotly
    from tl_asymmetry.plots import page

    if not isinstance(result, PairData):
        raise ValueError(
            f"expected a result of analyze_pair, got {type(result).__name__}; pass one, or tl_asymmetry.report(…) for "
            "a page of any result"
        )
    if spectra is not None and not isinstance(spectra, SpectralAnalysis):
        raise ValueError(f"expected spectra as a SpectralAnalysis, got {shown(spectra)}; pass analyze_spectra(…)")
    if not 0 <= directions <= MOST_DIRECTIONS:
        raise ValueError(
            f"expected directions from 1 to {MOST_DIRECTIONS}, got {directions}; pass a number in between, or 0"
        )
    view = None if model is None else ModelView(model)  # refused before any work
    file, pack, config = page_path(path), Pack(), result.config
    header: dict[str, Any] = {
        "title": result._title(),
        "facts": result._facts(),
        "notes": list(result.notes),
        "layers": config["shape"]["n_layers"],
        "ranks": config["ranks"],
        "shown": config["shown_rank"],
        "columns": [str(c) for c in result.table.columns],
        "nulls": contents.nulls(result),
        "verdicts": contents.verdicts(),
        "maps": contents.maps(result, pack),
        "usual": contents.usual_subspaces(result),
    }
    of_cards = Pack()
    cards: dict[str, Any] = {
        "attached": [
            contents.attached(name, source, config["shown_rank"], of_cards)
            for name, source in (("Edits", edits), ("Rewinding", rewinding), ("Trajectory", trajectory))
            if source is not None
        ],
        "curves": contents.curves(result, of_cards),
        "spectra": contents.spectra(result, of_cards),
        "frame": None if spectra is None else contents.frame(spectra, of_cards),
        "directions": _directions(result, view, directions, progress, of_cards),
    }
    own = files(__package__)
    title = f"Head explorer: {result._title()}"
    body = own.joinpath("explorer.html").read_text(encoding="utf-8").replace("{title}", title_markup(title))
    scripts = Html(
        page.page_settings()
        + page.packed(pack.block(header), "explorer-data")
        + page.packed(of_cards.block(cards), "explorer-cards")
        + page.plotly_script()
        + page.script(_script())
    )
    css = own.joinpath("explorer.css").read_text(encoding="utf-8")
    return write_page(file, document(title, Html(body), scripts, css=css))


def _script() -> str:
    """The parts as one function, which says on the page if it fails."""
    folder = files(__package__) / "script"
    parts = "\n".join((folder / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPT)
    return (
        f"(async () => {{\n{parts}\n}})().catch((error) => {{ "
        'document.getElementById("map").textContent = "This page could not be shown: " + error; throw error; });'
    )


def _directions(result: PairData, view: ModelView | None, n: int, progress: bool, pack: Pack) -> dict[str, Any]:
    """The directions of every head, or why there are none."""
    from tl_asymmetry.explore import contents

    if n == 0:
        return {"missing": "Directions were left out when this page was made (directions=0)."}
    if view is None and result._model is not None and (model := result._model()) is not None:
        view = ModelView(model)
    if view is None:
        return {"missing": "The base model was not at hand when this page was made, so no tokens and contexts could be "
                "looked up; pass model=base."}  # fmt: skip
    found = find_directions(
        view, result.arrays, result.config, n=n, tokens=NEAREST_TOKENS, contexts=CONTEXTS, progress=progress,
        argument="directions",
    )  # fmt: skip
    sequences = result.arrays["tokens"].split(result.arrays["lengths"].tolist())
    return contents.directions(found, sequences, view.tokenizer, pack)
