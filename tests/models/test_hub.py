"""A stand-in for the Hub on loopback says no in every way that it knows."""

import errno
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading

import pytest
from huggingface_hub import constants
from safetensors.torch import save_file

from flipproof.config import ModelConfig
from flipproof.errors import ConfigError
from flipproof.models import hub
from flipproof.models.hub import from_hub, reason
from flipproof.models.load import load_model, load_tokenizer, model_on_meta
from flipproof.models.tokenizer import byte_tokenizer

SAID = {
    "gated-anonymous": (401, {"X-Error-Code": "GatedRepo"}, r"it is gated \(401\); accept its terms at https://hugg"),
    "gated-refused": (403, {"X-Error-Code": "GatedRepo"}, r"gated, and this account has no access \(403\); ask for"),
    "no-such": (404, {"X-Error-Code": "RepoNotFound"}, "there is none, or it is private"),
    "private": (401, {"X-Error-Code": "RepoNotFound"}, "there is none, or it is private; .* log in"),
    "bad-token": (
        401,
        {"X-Error-Message": "Invalid credentials"},
        r"refused \(401: Invalid credentials\); check the to",
    ),
    "no-right": (403, {"X-Error-Message": "lacks read rights"}, r"access was refused \(403: .*lacks read rights"),
    "disabled": (403, {"X-Error-Message": "Access to this resource is disabled."}, r"refused \(403: .*is disabled"),
    "withdrawn": (410, {"X-Error-Message": "it is gone"}, "the Hub answered 410: it is gone"),
    "newer": (200, {}, "does not know model_type 'unheard_of'; a newer one may"),
    "with-code": (200, {}, "comes with code of its own"),
    "damaged": (200, {}, "config.json is damaged: Expecting property name"),
}
CONFIGS = {
    "newer": b'{"model_type": "unheard_of"}',
    "with-code": b'{"model_type": "own", "auto_map": {"AutoConfig": "x.C", "AutoModelForCausalLM": "x.M"}}',
    "damaged": b"{bad",
}


class Hub(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        name = next((name for name in SAID if f"/{name}" in self.path), "no-such")
        status, headers, _ = SAID[name]
        content = b""
        if status == 200:
            if self.path.endswith("/config.json"):
                content = CONFIGS[name]
                headers = {"X-Repo-Commit": "0" * 40, "ETag": '"1"'}
            else:
                status, headers = 404, {"X-Error-Code": "EntryNotFound"}
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


ASK = """
import json, sys
from flipproof.config import ModelConfig
from flipproof.data.source import open_source
from flipproof.errors import ConfigError
from flipproof.models.load import load_tokenizer, model_config
said = {}
for name in sys.argv[1:]:
    for what in (load_tokenizer, model_config):
        try:
            what(ModelConfig(hf_model_path=name), *[None] * (what is model_config))
        except ConfigError as error:
            said.setdefault(name, []).append(error.problems)
for source in [open_source("org/data", "text"), open_source("org/data", "text", streaming=True)] * ("org/data" in said):
    for what in (source.check, lambda: list(source.spans("training"))):
        try:
            what()
        except ConfigError as error:
            said["org/data"].append(error.problems)
print(json.dumps(said))
"""


def asked(names, home, port):
    """What a process of its own says of names as a tokenizer, as a model and of org/data as data; and its stderr."""
    there = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environ = os.environ | there | {"HF_HOME": str(home), "HF_DATASETS_CACHE": str(home / "data")}
    run = subprocess.run([sys.executable, "-c", ASK, *names], env=environ, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1]), run.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def said(home):
    """Name -> the lines about it as a tokenizer, and as a model, of this Hub."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found, _ = asked([f"org/{name}" for name in SAID], home, server.server_port)
    server.shutdown()
    server.server_close()
    return found


@pytest.mark.parametrize("name", SAID)
def test_what_the_hub_said_is_passed_on_in_a_line(said, name):
    tokenizer, model = said[f"org/{name}"]
    words = SAID[name][2]
    start = rf"model\.hf_model_path = 'org/{name}': no local directory, and the Hub did not give a"
    if name in ("newer", "with-code"):  # transformers looks for tokenizer files there, whatever the model
        assert re.match(f"{start} tokenizer of that name: no tokenizer.json", tokenizer[0])
    else:
        assert re.match(f"{start} tokenizer of that name: .*{words}", tokenizer[0])
    assert re.match(f"{start} model of that name: .*{words}", model[0])
    assert len(tokenizer) == len(model) == 1
    assert not re.search(r"\n", tokenizer[0] + model[0])


def test_a_hub_that_cannot_be_reached_is_not_asked_again_and_again_and_the_cache_counts(said, home):
    """The client itself would print two lines for each of six times, about each file."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and listens to none
        found, stderr = asked(["org/newer", "org/data"], home, nobody.getsockname()[1])
    assert "Retrying" not in stderr
    assert "refused" not in stderr
    assert found["org/newer"][1] == said["org/newer"][1]  # of its config.json, which was given before
    tokenizer, model, *data = (line for (line,) in found["org/data"])
    for line in tokenizer, model:
        assert line.endswith(": the Hub cannot be reached, and it is not in the cache; give a local directory")
    assert len(data) == 4
    assert all("data source 'org/data'" in line and "Couldn't reach 'org/data' on the Hub" in line for line in data)


class ConnectError(Exception):
    pass


class ConnectTimeout(Exception):
    pass


class ReadTimeout(Exception):
    pass


@pytest.mark.parametrize(
    ("answers", "is_asked"),
    [
        ([None], True),
        ([ReadTimeout], True),  # a slow one
        ([ConnectError, None], True),
        ([ConnectError, ConnectError], False),
        ([ConnectTimeout], False),
    ],
)
def test_a_slow_hub_is_asked(answers, is_asked, monkeypatch):
    class Session:
        def head(self, *_, **__):
            if (error := answers.pop(0)) is not None:
                raise error

    hub._reachable.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils.get_session", Session)
    monkeypatch.setattr(hub.time, "sleep", lambda _: None)
    seen = from_hub(lambda *_, **__: constants.is_offline_mode(), "org/model", "key", "a model")
    assert seen is not is_asked
    assert not answers
    assert not constants.is_offline_mode()
    hub._reachable.cache_clear()


def test_without_a_network_it_says_so():
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set, and it is not in the cache"):
        load_tokenizer(ModelConfig(tokenizer="no/such"))
    with pytest.raises(ConfigError, match=r"it is no Hub name either \(those are owner/name\)"):
        load_tokenizer(ModelConfig(tokenizer="not a/hub name"))


@pytest.mark.parametrize("name", ["./modle", "../modle", "/no/modle", "~/modle", "runs/x/modle", "modle.gguf"])
def test_what_is_meant_as_a_path_is_not_asked_for_on_the_hub(name, tmp_path, monkeypatch):
    def ask(*_, **__):
        raise AssertionError("asked")

    with pytest.raises(ConfigError, match=f"^key = '{re.escape(name)}': no local directory has this path$"):
        from_hub(ask, name, "key", "a model")
    (tmp_path / "runs" / "x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "runs" / "x")
    (tmp_path / "runs" / "modle").mkdir()
    assert from_hub(lambda name, **_: name, "../modle", "key", "a model") == "../modle"


def test_a_full_disk_says_so():
    full = OSError(errno.ENOSPC, "No space left on device")
    error = RuntimeError("Data processing error: something within")
    error.__cause__ = full
    assert reason(error, "org/model") == "no space is left on the device; HF_HOME names where downloads go"


@pytest.fixture
def directory(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(directory, words):
    config = ModelConfig(hf_model_path=str(directory))
    for read, *seed in ((load_model, 0), (model_on_meta,)):
        with pytest.raises(ConfigError, match=words) as error:
            read(config, byte_tokenizer(), None, *seed)
        assert len(str(error.value).splitlines()) == 1


def test_a_damaged_file_of_a_directory_is_named(directory):
    *_, last = sorted(directory.glob("*.safetensors"))
    content = last.read_bytes()
    for damaged in (content[:-1], content[:4], b"", b"\xff" * 100, b"version https://git-lfs.github.com/spec/v1\n"):
        last.write_bytes(damaged)
        refused(directory, rf"{last.name} is damaged or cut short: Error while")
    last.unlink()
    refused(directory, rf"{last.name}")
    (directory / "model.safetensors.index.json").write_text("{")
    refused(directory, r"model\.safetensors\.index\.json is damaged: Expecting property name")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"model_type": "unheard_of"},
            r"transformers [\d.]+ does not know model_type 'unheard_of'; a newer one may \(pip",
        ),
        ({"model_type": "vit"}, "its ViTConfig is not of a causal language model"),
        ({"model_type": "llava"}, "its LlavaConfig is not of a causal language model"),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "x.C"}},
            r"code of its own \(trust_remote_code\), which is",
        ),
    ],
)
def test_what_is_no_model_of_ours_is_told_by_name(directory, config, words):
    (directory / "config.json").write_text(json.dumps(config))
    refused(directory, words)
    if config.get("model_type") in ("vit", "llava"):
        with pytest.raises(ConfigError, match=words):  # from scratch too
            model_on_meta(ModelConfig(hf_model_path=str(directory), init="random"), byte_tokenizer(), None)


def test_other_formats_are_told_by_name(directory, tmp_path):
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    (directory / "consolidated.00.pth").write_bytes(b"x")
    refused(directory, r"consolidated\.00\.pth is Meta's own format")
    (directory / "consolidated.00.pth").unlink()
    refused(directory, r"holds no readable model \(no model\.safetensors\)")
    (directory / "config.json").unlink()
    refused(directory, r"no config\.json")
    save_file({}, tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors", "is a file; name the directory that it is in")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    refused(tmp_path / "adapter", r"it is a PEFT adapter; name its base model here \(org/base\), and it with --adapter")
