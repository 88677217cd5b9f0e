"""What is raised where a user's input is at fault, and how many problems become few lines."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class ConfigError(ValueError):
    """Everything that is wrong with a config, one problem a line."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type, tuple[list[str]]]:
        return type(self), (self.problems,)  # between processes; the text alone would come apart into letters


def first_of(problems: list[str]) -> str:
    """The first of many problems of one kind by the alphabet, and how many more there are."""
    more = f" (and {len(problems) - 1} more like it)" if len(problems) > 1 else ""
    return f"{min(problems)}{more}"


@contextmanager
def about(what: str) -> Iterator[None]:
    """Within the block errors say what they are about."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError([f"{what}: {problem}" for problem in error.problems]) from error
