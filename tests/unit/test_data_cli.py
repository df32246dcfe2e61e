"""``moetrain data``: the three commands end to end, and the words it does not understand."""

import json

import pytest

from moetrain.cli.data import main
from moetrain.config import UserError


def test_tokenize_then_info(tmp_path, capsys):
    for name in ("a", "b"):
        rows = [json.dumps({"body": f"{name} line {i} of text"}) for i in range(30)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    words = [f"input={tmp_path}/a.jsonl,{tmp_path}/b.jsonl", f"output={tmp_path}/out", "vocab_size=300", "field=body"]
    assert main(["tokenize", *words, "valid_fraction=0.2"]) == 0
    with pytest.raises(UserError, match="overwrite=true"):
        main(["tokenize", *words])
    assert main(["tokenize", *words, "overwrite=True"]) == 0
    capsys.readouterr()
    assert main(["info", f"{tmp_path}/out"]) == 0
    out = capsys.readouterr().out
    assert "hashes match" in out
    assert "30 files" not in out
    assert "files=2" in out
    file = tmp_path / "out" / "train.bin"
    data = bytearray(file.read_bytes())
    data[0], data[2] = data[2], data[0]
    data[1], data[3] = data[3], data[1]
    file.write_bytes(data)
    with pytest.raises(UserError, match="does not match its sha256"):
        main(["info", f"{tmp_path}/out"])


def test_input_may_be_repeated(tmp_path):
    for name in ("a,b.txt", "c.txt"):  # a comma may be part of a name
        (tmp_path / name).write_text(f"text of {name}\n" * 9)
    main(["tokenize", f"input={tmp_path}/a,b.txt", f"input={tmp_path}/c.txt", f"output={tmp_path}/o", "vocab_size=260"])
    assert json.loads((tmp_path / "o" / "corpus.json").read_text())["source"]["files"] == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["tokenise"], r"unknown command 'data tokenise'; did you mean 'tokenize'\?"),
        (["tokenize", "inptu=a"], r"unknown key 'inptu'; did you mean 'input'\?"),
        (["tokenize", "a.txt"], r"'a.txt' is not key=value \(keys: input"),
        (["tokenize", "output=a"], "input= is missing"),
        (["tokenize", "input=a"], "output= is missing"),
        (["tokenize", "input="], "input= has no value"),
        (["tokenize", "vocab_size=many"], "vocab_size='many' is not a whole number"),
        (["tokenize", "valid_fraction=x"], "valid_fraction='x' is not a number"),
        (["tokenize", "overwrite=yes"], "overwrite='yes' is not true or false"),
        (["tokenize", "input=a", "output=b"], "give either tokenizer=PATH .* or vocab_size=N"),
        (["info"], "takes one corpus folder, not 0 words"),
        (["info", "nowhere"], "no tokenized corpus at nowhere"),
        (["prepare", "vocab_size=5"], "vocab_size=5 is below 257"),
    ],
)
def test_words_it_does_not_understand(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        main(argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("argv", [[], ["--help"], ["tokenize", "--help"]])
def test_help(argv, capsys):
    assert main(argv) == 0
    assert "moetrain data tokenize" in capsys.readouterr().out
