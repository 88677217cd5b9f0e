"""One HTML file that shows what was measured, and its pictures and tables as files for a paper.

``report`` reads what a directory holds (``read.py``), makes a section of each thing that is there (``sections.py``),
and writes ``report.html``, which needs nothing beside it to be read offline and runs no script, and the directory
``report`` with every picture as PNG and every table as CSV. Numbers in CSV files have all their digits; on the page
they have five.

A report is derived, so a new one takes the place of an old one. Nothing else is ever overwritten: the page says in its
head that it is a report, and the directory keeps a list of the files that were written into it.
"""

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, PackageLoader

from flipproof import pictures
from flipproof.errors import ConfigError
from flipproof.files import check_writable, claimed, clear_dead, named, temporary_name, write_atomically
from flipproof.report.read import Sources, read_sources
from flipproof.report.sections import Section, free_name, sections_of

PAGE = "report.html"
_WRITTEN = ".written"
"""In the directory of pictures and tables: the names of the files that are the report's."""
_MARK = '<meta name="generator" content="flipproof report">'


def report(directory: Path, to: Path | None = None) -> Path:
    """Write the report of a directory; returns the page's path.

    Args:
        directory: a run, a sweep, a profile or generated texts, or a directory that holds several of these.
        to: the page, ``report.html`` in the directory by default. Pictures and tables go beside it, into a directory
            of the same name without ``.html``.

    Raises:
        ConfigError: where there is nothing to show, a file is damaged, or something that is not a report is in the way;
            nothing is written then.
    """
    page = to or directory / PAGE
    if not page.name:  # as "."
        raise ConfigError([f"--to {page}: a file that ends in .html is allowed"])
    folder = page.with_suffix("")
    _check_target(page, folder)
    sources = read_sources(directory)
    sections = sections_of(sources)
    files = _files_of(sections, folder.name)
    _write(page, folder, _render(directory, sources, sections, folder.name), files)
    return page


def _files_of(sections: Iterable[Section], folder: str) -> dict[str, bytes]:
    """Name -> content of every picture and table; sections and drawings learn what became of theirs."""
    files: dict[str, bytes] = {}
    for section in sections:
        for i, drawing in enumerate(section.drawings):
            name = free_name(f"{section.id}-{i + 1}.png" if len(section.drawings) > 1 else f"{section.id}.png", files)
            figure = drawing.draw()
            drawing.svg = pictures.svg(figure, f"figure-{len(files)}", section.title)
            drawing.png = quote(f"{folder}/{name}")
            files[name] = pictures.png(figure)
        section.tables = [replace(table, file=free_name(table.file, files)) for table in section.tables]
        files |= {table.file: table.to_csv() for table in section.tables}
    return files


def _render(directory: Path, sources: Sources, sections: Sequence[Section], folder: str) -> str:
    from flipproof import __version__

    def all_of(values: Iterable[str | None]) -> str:
        return ", ".join(dict.fromkeys(value for value in values if value))

    about = sources.about
    models = list(dict.fromkeys(one.model for one in about if one.model))
    main = [one.model for one in about if "/" not in one.name and one.model]  # what the directory itself is about
    name = main[0] if main else models[0] if len(models) == 1 else directory.resolve().name
    dates = [one.date for one in about]
    facts = [all_of(one.dtype for one in about), all_of(one.text for one in about), str(max(dates)) if dates else ""]
    template = Environment(
        loader=PackageLoader("flipproof.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return template.get_template("page.html.jinja").render(
        title=f"Bit flips in {name}",
        about=" · ".join(fact for fact in facts if fact),
        lead=next((section.finding for section in sections if section.finding), ""),
        notes=sources.notes,
        sections=sections,
        files=about,
        folder=folder,
        version=__version__,
    )


def _check_target(page: Path, folder: Path) -> None:
    """Raises ConfigError where the page or its directory could not be written, or would take the place of something
    that is no report."""
    for path in (page, folder, folder / _WRITTEN):
        check_writable(path, "--to")
    problems = []
    if page.suffix != ".html":
        problems.append(f"--to {page}: a file that ends in .html is allowed")
    elif page.exists() and not (page.is_file() and _MARK in page.read_text("utf-8", errors="replace")[:2000]):
        problems.append(f"{page} exists and is no report; name another file with --to")
    if page.suffix == ".html" and folder.exists():
        written = folder / _WRITTEN
        own = {_WRITTEN, *written.read_text("utf-8").splitlines()} if written.is_file() else set()
        other = sorted({path.name for path in folder.iterdir()} - own) if folder.is_dir() else [folder.name]
        if other:
            problems.append(f"{folder} holds what is no report's ({other[0]}); move it, or name another file with --to")
    if problems:
        raise ConfigError(problems)


def _write(page: Path, folder: Path, html: str, files: Mapping[str, bytes]) -> None:
    """Everything into a hidden directory first, which then takes the place of the old one; the page comes last."""
    page.parent.mkdir(parents=True, exist_ok=True)
    clear_dead(folder)
    new = temporary_name(folder)
    new.mkdir()
    try:
        with claimed(new), named(folder):
            for name, content in files.items():
                (new / name).write_bytes(content)
            (new / _WRITTEN).write_text("".join(f"{name}\n" for name in files), "utf-8")
            _replace(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    write_atomically(page, html)


def _replace(new: Path, folder: Path) -> None:
    """Give ``new`` the name ``folder``, whatever has it, or is given it by another process at the same time."""
    while True:
        try:
            os.replace(new, folder)
            return
        except OSError:
            if not os.path.lexists(folder):
                raise
        old = temporary_name(folder)
        with suppress(FileNotFoundError):  # another process was faster
            os.replace(folder, old)
            shutil.rmtree(old, ignore_errors=True)
