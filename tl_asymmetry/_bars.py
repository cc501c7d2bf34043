"""Progress bars of text in a notebook without ipywidgets, without the warning that there could be nicer ones.

tqdm warns when `tqdm.auto` is first imported, whoever does it; so it is done here, before any of the libraries does.
"""

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="IProgress not found")
    import tqdm.auto  # noqa: F401
