"""What a directory or the Hub gives, or the one line that says why it gives nothing."""

import errno
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from flipproof.errors import ConfigError
from flipproof.files import is_path


def expand(name: str) -> str:
    """A directory or Hub name as ``transformers`` takes it: with ``~`` said in full."""
    return os.path.expanduser(name) if name.startswith("~") else name


def from_hub(load: Any, name: str, key: str, what: str, **kwargs: Any) -> Any:
    """``load(name)`` of ``transformers``; no code of the repository is ever run.

    Args:
        load: a ``from_pretrained``.
        name: a directory or a Hub name.
        key: the config key that names it.
        what: what is wanted: "a model", "a tokenizer".

    Raises:
        ConfigError: with the reason that was given, and what to do about it.
    """
    path = Path(expand(name))
    if path.is_file():
        raise ConfigError(
            [f"{key} = {name!r}: is a file; name the directory that it is in (by itself only a .gguf file is read)"]
        )
    if is_path(name) and not path.exists():  # the Hub's client would ask for it, and ask again
        raise ConfigError([f"{key} = {name!r}: no local directory has this path"])
    try:
        if path.is_dir():
            return load(str(path), trust_remote_code=False, **kwargs)
        with cache_where_unreachable():
            return load(expand(name), trust_remote_code=False, **kwargs)
    except ConfigError:
        raise
    except Exception as error:  # transformers, safetensors and the Hub client raise many kinds, all meaning this
        why = reason(error, name)
        if path.is_dir():
            raise ConfigError([f"{key} = {name!r}: the directory holds no readable {what[2:]} ({why})"]) from error
        raise ConfigError(
            [f"{key} = {name!r}: no local directory, and the Hub did not give {what} of that name: {why}"]
        ) from error


@contextmanager
def cache_where_unreachable() -> Iterator[None]:
    """Within its block the Hub's client, and ``datasets``, take what their caches hold and ask nobody, where the Hub
    cannot be reached. Left to itself the client asks six times for each file: half a minute and a dozen lines."""
    from huggingface_hub import constants

    if constants.is_offline_mode() or _reachable(int(time.monotonic() / 60)):
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


@lru_cache(maxsize=1)
def _reachable(_minute: int) -> bool:
    """Whether there is anybody to ask: all answers mean so, and slow ones, too. Asked anew each minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    for attempt in range(2):
        try:
            get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT, follow_redirects=False)
            return True
        except Exception as error:  # of httpx or of httpx2, as the client's version has it
            if type(error).__name__ == "ConnectTimeout":
                return False
            if type(error).__name__ != "ConnectError":
                return True
        if not attempt:
            time.sleep(1)  # a name server may fail once
    return False


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .:") if lines else type(error).__name__


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised for, the innermost last."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def reason(error: BaseException, name: str) -> str:
    """What an error of ``transformers`` means for the directory or Hub name, and the way out, in a line."""
    for cause in reversed(list(_chain(error))):
        if known := _hub_reason(cause, name) or _local_reason(cause, name):
            return known
    return _first_line(error)


def _hub_reason(error: BaseException, name: str) -> str | None:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"https://huggingface.co/{name}"
    match error:
        case GatedRepoError() if error.response.status_code == 403:
            return f"it is gated, and this account has no access (403); ask for it at {page}"
        case GatedRepoError():
            return f"it is gated (401); accept its terms at {page} and log in (hf auth login, or HF_TOKEN)"
        case RevisionNotFoundError():
            return "the revision is not there"
        case RepositoryNotFoundError():
            return "there is none, or it is private; see the spelling, or log in (hf auth login, or HF_TOKEN)"
        case HfHubHTTPError():
            status = getattr(error.response, "status_code", "no status")
            said = getattr(error, "server_message", None) or _first_line(error)
            if status in (401, 403):
                return f"access was refused ({status}: {said}); check the token (hf auth whoami, HF_TOKEN)"
            return f"the Hub answered {status}: {said}"
        case HFValidationError():
            return "it is no Hub name either (those are owner/name)"
        case LocalEntryNotFoundError():
            if constants.is_offline_mode():
                return "HF_HUB_OFFLINE is set, and it is not in the cache; unset it, or give a local directory"
            return "the Hub cannot be reached, and it is not in the cache; give a local directory"
    return None


def _local_reason(error: BaseException, name: str) -> str | None:
    text = str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "no space is left on the device; HF_HOME names where downloads go"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, json.JSONDecodeError):
        return _first_damage(name, "*.json", _damaged_json) or _first_line(error)
    if isinstance(error, SafetensorError | FileNotFoundError) and (
        damage := _first_damage(name, "*.safetensors", damaged_safetensors)
    ):
        return damage
    if isinstance(error, SafetensorError):
        return _first_line(error)
    if found := re.search(r"model type `([^`]*)` but Transformers does not recognize", text):
        import transformers

        return (
            f"transformers {transformers.__version__} does not know model_type {found[1]!r}; "
            "a newer one may (pip install -U transformers)"
        )
    if "trust_remote_code" in text:
        return "it comes with code of its own (trust_remote_code), which is not run; take a model that transformers has"
    if found := re.search(r"Unrecognized configuration class <class '[\w.]*?(\w+)'> for this kind of AutoModel", text):
        return f"its {found[1]} is not of a causal language model"
    if found := re.search(
        r"does not appear to have a file named (config\.json)|no file named (model\.safetensors)", text
    ):
        return _without(Path(expand(name)), found[1] or found[2])
    if "Should have a `model_type` key" in text:
        directory = Path(expand(name))
        there = not directory.is_dir() or (directory / "config.json").exists()
        return "its config.json names no model_type" if there else _without(directory, "config.json")
    if "Couldn't instantiate the backend tokenizer" in text:
        return "no tokenizer.json, nor what one is made of (some need pip install sentencepiece tiktoken)"
    return None


def _without(directory: Path, wanted: str) -> str:
    """What is there where a model's file is not."""
    files = sorted(file.name for file in directory.glob("*")) if directory.is_dir() else []
    if "adapter_config.json" in files and wanted == "config.json":
        try:
            base = json.loads((directory / "adapter_config.json").read_bytes())["base_model_name_or_path"]
        except (ValueError, LookupError, TypeError):
            base = "its adapter_config.json may say which"
        return f"it is a PEFT adapter; name its base model here ({base}), and it with --adapter"
    if found := [name for name in files if name.endswith((".pth", ".pt", ".ckpt"))]:
        return f"{found[0]} is Meta's own format, or another that transformers does not read; convert it to safetensors"
    return f"no {wanted}"


def _first_damage(name: str, pattern: str, damaged: Callable[[Path], str | None]) -> str | None:
    """What is wrong with the first damaged file of a directory, or of what the Hub gave of a name."""
    from transformers.utils import cached_file

    directory = Path(expand(name))
    if not directory.is_dir():
        config = cached_file(name, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False)
        if config is None:
            return None
        directory = Path(config).parent
    return next(filter(None, map(damaged, sorted(directory.glob(pattern)))), None)


def _damaged_json(path: Path) -> str | None:
    try:
        json.loads(path.read_bytes())
    except ValueError as error:
        return f"{path.name} is damaged: {_first_line(error)}"
    return None


def damaged_safetensors(path: Path) -> str | None:
    """What is wrong with a safetensors file; None where nothing is."""
    try:
        path.open("rb").close()  # safetensors says of whatever it cannot open that it is not there
    except OSError as error:
        return f"{path}: {error.strerror}"
    try:
        with safe_open(path, framework="pt"):
            return None
    except (OSError, SafetensorError) as error:
        return f"{path.name} is damaged or cut short: {_first_line(error)}"
