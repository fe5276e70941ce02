"""How long work says how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Called as progress(what, done, total) while something slow goes on.
Progress = Callable[[str, float, float], None]


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """A rich progress bar with time left; plain lines now and then where there is no terminal."""
    from rich import progress as bars
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        last = [-1.0]

        def line(what: str, done: float, total: float) -> None:
            if done >= total or done < last[0] or done - last[0] >= total / 10:
                console.print(f"{title}: {what} ({done:.0f}/{total:.0f})", highlight=False)
                last[0] = done

        yield line
        return
    columns = (
        bars.TextColumn("[bold]{task.fields[title]}"),
        bars.BarColumn(),
        bars.TaskProgressColumn(),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.description}"),
    )
    # Stages take minutes and differ in speed: time left goes by the last half hour.
    with bars.Progress(*columns, console=console, speed_estimate_period=1800) as bar:
        task = bar.add_task("", total=None, title=title)

        def update(what: str, done: float, total: float) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield update
