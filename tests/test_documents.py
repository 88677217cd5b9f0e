"""The documents at the top level and in docs/: what they link to is there, and the README stays short."""

import re
import tomllib
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "README.md"])


def prose(text):
    """Without code that reads as headings or links."""
    return re.sub(r"`[^`\n]*\]\([^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def anchors(text):
    """What GitHub makes of headings."""
    for heading in re.findall(r"^#+ (.*)$", prose(text), flags=re.M):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(document.read_text())):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), link
        assert not anchor or anchor in set(anchors(target.read_text())), link


def test_paths_that_documents_name_exist():
    text = "".join(document.read_text() for document in DOCUMENTS)
    found = set(re.findall(r"(?<![\w./])((?:benchmarks|docs|examples|tests)/[\w/.-]+\.\w+)", text))
    assert len(found) > 5
    assert [path for path in sorted(found) if not (ROOT / path).exists()] == []


def test_the_readme_is_150_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_readmes_python_runs(monkeypatch, tiny_llama, capsys):
    class Tokenizer:
        def __call__(self, text, return_tensors):
            return {"input_ids": torch.tensor([list(text.encode())])}

        def decode(self, ids):
            return f"{len(ids)} tokens"

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda _: tiny_llama())
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda _: Tokenizer())
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    exec(code, {})
    said = capsys.readouterr().out
    assert "faulty linear layers" in said
    assert said.endswith(f"{len('London is') + 50} tokens\n")


def test_the_architecture_names_every_file_in_the_order_of_imports():
    tree = (ROOT / "ARCHITECTURE.md").read_text().partition("## The rooms")[2].partition("```\n")[2].partition("```")[0]
    room, named = Path(), []
    for line in tree.splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0] if line.strip() else ""
        if indent == 0 and name.endswith("/"):
            room = Path(name)
        elif name.endswith(".py"):
            named.append(str(room / name if indent else Path(name)))
    source = ROOT / "src" / "flipproof"
    there = {path.relative_to(source) for path in source.rglob("*.py")}
    entrances = {path for path in there if path.stem == "__init__" and len(path.parts) > 1} | {Path("__main__.py")}
    assert sorted(named) == sorted(str(path) for path in there - entrances)
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]:
        _, _, room = contract.get("containers", [""])[0].partition(".")
        if room:
            layers = [f"{room}/{name}.py" for name in reversed(contract["layers"])]
            assert [name for name in named if name.startswith(f"{room}/")] == layers
