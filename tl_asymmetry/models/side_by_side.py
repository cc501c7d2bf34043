"""Layers side by side: many small eigensolves keep the cores busier one on each than one on all."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from tqdm.auto import tqdm

from tl_asymmetry.geometry.memory import return_freed_memory
from tl_asymmetry.geometry.precision import exact_products

Result = TypeVar("Result")


def side_by_side(
    work: Callable[[int], Result],
    count: int,
    *,
    device: torch.device,
    description: str,
    progress: bool,
    workers: int | None = None,
) -> list[Result]:
    """`[work(0), …, work(count − 1)]`, as many at a time as torch has threads, which they share out.

    Two solves of 768 × 768 on one core each took 0.6 of the time of one after the other on both. What is computed
    does not depend on how many run at once (beyond the last digits of a product on several threads). An exception,
    Ctrl-C included, drops what has not begun.

    Args:
        work: must only read what the calls share; runs without gradients.
        count: how many.
        device: of the products within, for the precision they run in.
        description: of the progress bar.
        progress: show it.
        workers: no more at a time than this.
    """

    def alone(index: int) -> Result:
        with torch.no_grad():  # the mode belongs to a thread
            result = work(index)
        return_freed_memory()
        return result

    threads = torch.get_num_threads()
    workers = max(1, min(threads, count, workers or count))
    # The precision of products is a global setting: made exact once out here, no thread changes it under another.
    with (
        exact_products(device),
        ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,)) as pool,
        tqdm(total=count, desc=description, disable=not progress) as bar,
    ):
        pending = [pool.submit(alone, index) for index in range(count)]
        try:
            results = []
            for future in pending:
                results.append(future.result())
                bar.update()
            return results
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
