"""Plots prepared data as a PNG: histograms of document lengths, and tokens by source."""

from typing import Any

import numpy as np
from etils import epath

from llama_jax.data.show.summary import PreparedData, document_lengths

ASKED, GRID = "#20639b", "#d9d9d9"
THERE = "#f0a33c"
INK = "#333333"


def plot(prepared: PreparedData, path: epath.Path) -> None:
    """Draws the lengths of documents in a sample of the shards, and the tokens by source.

    Raises:
      UserError: an index is damaged.
      OSError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths = {
        name: document_lengths(prepared.folders[name], m) for name, m in prepared.manifests.items()
    }
    rows, several = len(lengths), len(lengths) > 1
    height = 1.3 + max(1.15 * rows, 2.2)
    figure = pyplot.figure(figsize=(11 if several else 8, height), dpi=120, layout="constrained")
    grid = figure.add_gridspec(rows, 2 if several else 1, width_ratios=(3, 2) if several else None)
    _plot_lengths(figure, grid, prepared, lengths)
    if several:
        _plot_shares(figure.add_subplot(grid[:, 1]), prepared)
    figure.suptitle(str(prepared.folder), color=INK, fontsize=11, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        figure.savefig(file, format="png")
    pyplot.close(figure)


def _plot_lengths(
    figure: Any, grid: Any, prepared: PreparedData, lengths: dict[str, np.ndarray]
) -> None:
    """Draws one histogram for each source, below each other, on the same logarithmic scale."""
    from matplotlib import ticker

    seq_len = prepared.config.train.seq_len
    longest = max(int(found.max()) for found in lengths.values())
    shortest = min(int(found.min()) for found in lengths.values())
    edges = np.geomspace(min(shortest, seq_len) * 0.9, max(longest, seq_len) * 1.1, 49)
    first = None
    for index, (name, found) in enumerate(lengths.items()):
        axes = figure.add_subplot(grid[index, 0], sharex=first)
        first = first or axes
        weights = np.full(len(found), 100 / len(found))
        axes.hist(found, edges, weights=weights, color=ASKED, alpha=0.85)
        axes.axvline(seq_len, color=THERE, linewidth=1.5)
        axes.set(xscale="log", xlim=(edges[0], edges[-1]), ylabel="% of docs")
        longer = (found > seq_len + 1).mean()
        note = f"median {np.median(found):,.0f} tokens\n{longer:.1%} longer than seq_len"
        axes.set_ylim(top=axes.get_ylim()[1] * 1.5)  # room for the note
        axes.text(0.99, 0.94, note, transform=axes.transAxes, ha="right", va="top", fontsize=8)
        axes.text(0.01, 0.94, name, transform=axes.transAxes, va="top", weight="bold", color=INK)
        _plain(axes)
        axes.tick_params(labelbottom=index == len(lengths) - 1)
        if index == 0:
            axes.set_title("Tokens in a document", fontsize=10, loc="left")
    axes.set_xlabel(f"tokens (the line: seq_len = {seq_len:,})")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.set_minor_formatter("")
    narrow = edges[-1] < 500 * edges[0]  # too few powers of ten to label the axis
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if narrow else (1,)))


def _plot_shares(axes: Any, prepared: PreparedData) -> None:
    """Draws the requested share of each source next to its share of the available tokens.

    For conversations, both are shares of the tokens in answers.
    """
    answers = bool(prepared.config.data.template)
    kind = "answer_tokens" if answers else "tokens"
    tokens = {name: m["splits"]["train"][kind] for name, m in prepared.manifests.items()}
    total = sum(tokens.values())
    place = np.arange(len(tokens))
    requested = [100 * float(prepared.batches.schedule.shares.get(name, 0)) for name in tokens]
    available = [100 * count / total for count in tokens.values()]
    for offset, values, label, colour in (
        (-0.19, requested, "requested", ASKED),
        (0.19, available, "available", THERE),
    ):
        bars = axes.barh(place + offset, values, 0.36, label=label, color=colour)
        axes.bar_label(bars, [f"{value:.1f}%" for value in values], padding=3, fontsize=8)
    axes.set_title("Tokens by source", fontsize=10, loc="left")
    axes.set(
        xlabel="% of tokens in answers" if answers else "% of tokens",
        xlim=(0, max(*requested, *available) * 1.2),
    )
    axes.set_yticks(place, [f"{name}\n{tokens[name]:,}" for name in tokens])
    axes.set_ylim(len(tokens) - 0.5, -0.5)
    # The legend is above the bars, since a bar may cover any place inside the axes.
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.99), ncols=2, fontsize=9)
    _plain(axes)
    axes.grid(axis="y", visible=False)


def _plain(axes: Any) -> None:
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(which="both", labelsize=8)
