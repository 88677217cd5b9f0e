"""``flipproof plan --picture``: the memory of each GPU by part, for each level of what blocks keep."""

from pathlib import Path

from matplotlib.figure import Figure

from flipproof.errors import ConfigError
from flipproof.files import check_new, named, replace_file
from flipproof.pictures import INK, PALETTE, PAPER, png, styled
from flipproof.plan.estimate import Plan
from flipproof.plan.memory import Kept, Memory

_PARTS = {
    "weights, adapters": ("weights", "adapters"),
    "AdamW's moments": ("AdamW's moments",),
    "gradients": ("gradients",),
    "activations": ("activations",),
    "kept weights": ("kept weights",),
    "gathered": ("gathered",),
    "at work": ("a block at work", "loss", "cuBLAS"),
}
"""What a colour stands for: parts of ``Memory``, which are at most at one time or belong together."""
_GIB = 2**30
_OUTSIDE, _OUTSIDE_COLOUR = "CUDA and gaps", "#C9C9C6"
_LEVELS = {
    "nothing": "nothing\n(full)",
    "products": "products\n(selective)",
    "everything": "everything\n(none)",
    "weights": "everything and\nmerged weights",
}


def memory_bars(plan: Plan) -> Figure:
    """GiB of each GPU at their most, one bar for each level and one for the config's own setting; the GPU's memory and
    what of it training may fill are lines."""
    bars: list[tuple[str, Memory]] = [(_LEVELS[level], memory) for level, memory in plan.by_level.items()]
    bars.append(("\n".join(["this config:", *_said(plan.kept)]), plan.memory))
    drawn = {name: [sum(m.parts.get(part, 0) for part in parts) for _, m in bars] for name, parts in _PARTS.items()}
    drawn[_OUTSIDE] = [memory.needed - memory.allocated for _, memory in bars]
    reach = max(plan.gpu.memory, *(memory.needed / _GIB for _, memory in bars))
    title = f"memory of each of {plan.spread.gpus} x {plan.gpu.name}, by what blocks keep for backward"
    with styled(3.4, 6.6, title) as (figure, axis):
        handles, left = [], [0.0] * len(bars)
        for (name, sizes), colour in zip(drawn.items(), (*PALETTE, _OUTSIDE_COLOUR), strict=True):
            if any(sizes):
                widths = [size / _GIB for size in sizes]
                handles.append(axis.barh(range(len(bars)), widths, left=left, height=0.62, color=colour, label=name))
                left = [start + width for start, width in zip(left, widths, strict=True)]
        for gib, style, name in ((plan.gpu.memory, "-", "the GPU's"), (plan.room / _GIB, "--", "training may fill")):
            handles.append(axis.axvline(gib, color=INK, lw=1.1, ls=style, label=f"{name} {gib:.1f} GiB"))
        for place, end in enumerate(left):  # over the lines, which may pass there
            axis.text(end + 0.01 * reach, place, f"{end:.1f}", va="center", fontsize=8, zorder=5,
                      bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1.0})  # fmt: skip
        axis.set_xlim(0, 1.1 * reach)
        axis.set_yticks(range(len(bars)), [label for label, _ in bars])
        axis.set_ylim(len(bars) - 0.5, -0.5)
        axis.grid(visible=False, axis="y")
        axis.tick_params(axis="y", length=0)
        axis.set_xlabel("GiB")
        figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def _said(kept: Kept) -> list[str]:
    some = {"merged weights" if level == "weights" else level: n for level, n in kept.items() if n}
    if len(some) == 1:
        return [f"{name}, all blocks" for name in some]
    return [f"{name}, {n} block{'s' * (n > 1)}" for name, n in some.items()]


def check_picture(path: Path) -> None:
    """Raises ConfigError where ``path`` is no PNG file, is there already, or could not be written."""
    if path.suffix.lower() != ".png":
        raise ConfigError([f"--picture {path}: a file that ends in .png is allowed"])
    check_new(path, "--picture", "file")


def write_picture(plan: Plan, path: Path) -> None:
    """``memory_bars`` as a PNG, to what passed ``check_picture``; its directory is made. Raises ConfigError where it
    cannot be written after all."""
    picture = png(memory_bars(plan))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with named(path), replace_file(path) as file:
            file.write(picture)
    except OSError as error:
        raise ConfigError([f"--picture: {path} could not be written ({error.strerror})"]) from error
