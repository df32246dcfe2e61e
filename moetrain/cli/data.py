"""``moetrain data``: tokenize text into a corpus folder, check one, build the default one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from moetrain.config import UserError, nearest
from moetrain.data import stdlib
from moetrain.data.corpus import SPLITS, Corpus
from moetrain.data.loader import DataConfig
from moetrain.data.tokenize import tokenize

_USAGE = """\
usage: moetrain data COMMAND [key=value ...]

moetrain data tokenize input=PATH[,PATH ...] output=FOLDER vocab_size=N | tokenizer=PATH
    Makes a tokenized corpus of text. Killed in the middle, the same command goes on where it stopped.

    input=           a file, a folder or a glob; several with commas, or input= several times.
                     .txt: one document per file; .jsonl: one per line; .parquet: one per row; also .gz
    output=          the corpus folder to write
    vocab_size=      train a byte-level BPE tokenizer of this many ids on the input
    tokenizer=       or use this one: a tokenizer.json, or a corpus folder
    field=           the field (column) with the text [text]
    valid_fraction=  the part of the documents that is held out [0.01]
    overwrite=       true replaces the corpus that is there [false]

moetrain data info FOLDER
    Prints what a corpus holds and checks its files against their hashes.

moetrain data prepare [vocab_size=N] [cache=FOLDER]
    Builds the default corpus, the source code of Python's standard library, as training does on first use.
"""

_Reader = Callable[[str, str], Any]


def main(argv: list[str]) -> int:
    """Runs ``moetrain data ARGV``; raises ``UserError`` for the caller to print."""
    command, words = (argv[0], argv[1:]) if argv else ("--help", [])
    if any(word in ("-h", "--help", "help") for word in (command, *words)):
        print(_USAGE, end="")
        return 0
    commands = {"tokenize": _tokenize, "info": _info, "prepare": _prepare}
    if command not in commands:
        raise UserError(f"unknown command 'data {command}'{nearest(command, commands)} (one of {', '.join(commands)})")
    commands[command](words)
    return 0


def _tokenize(words: list[str]) -> None:
    values = _parse(
        words,
        {
            "input": _texts,
            "output": _text,
            "tokenizer": _text,
            "vocab_size": _integer,
            "field": _text,
            "valid_fraction": _number,
            "overwrite": _switch,
        },
    )
    for needed in ("input", "output"):
        if needed not in values:
            raise UserError(f"{needed}= is missing: moetrain data tokenize input=PATH output=FOLDER vocab_size=N")
    tokenize(values.pop("input"), output=Path(values.pop("output")), **values)


def _info(words: list[str]) -> None:
    if len(words) != 1:
        raise UserError(f"moetrain data info takes one corpus folder, not {len(words)} words")
    corpus = Corpus.open(Path(words[0].removeprefix("path=")))
    corpus.verify()
    print(f"{corpus.path}: whole, hashes match")
    print(f"fingerprint  {corpus.fingerprint}")
    print(f"tokenizer    {corpus.tokenizer_fingerprint[:16]}, {corpus.vocab_size:,} ids, end of document {corpus.eos}")
    for split in SPLITS:
        of = corpus.meta["splits"][split]
        ratio = of["num_bytes"] / max(of["num_tokens"], 1)
        print(
            f"{split:<12} {of['num_tokens']:,} tokens, {of['num_documents']:,} documents, "
            f"{of['num_bytes']:,} bytes of text ({ratio:.2f} per token)"
        )
    print("source       " + ", ".join(f"{key}={value}" for key, value in corpus.meta.get("source", {}).items()))


def _prepare(words: list[str]) -> None:
    default = DataConfig()
    values = {"cache": default.cache, "vocab_size": default.vocab_size}
    values |= _parse(words, {"cache": _text, "vocab_size": _integer})
    print(stdlib.prepare(Path(values["cache"]), vocab_size=values["vocab_size"], log=print))


def _parse(words: list[str], readers: dict[str, _Reader]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"'{word}' is not key=value (keys: {', '.join(readers)})")
        if key not in readers:
            raise UserError(f"unknown key '{key}'{nearest(key, readers)} (valid here: {', '.join(readers)})")
        if not text:
            raise UserError(f"{key}= has no value")
        value = readers[key](key, text)
        values[key] = values[key] + value if key in values and isinstance(value, list) else value
    return values


def _text(key: str, text: str) -> str:
    return text


def _texts(key: str, text: str) -> list[str]:
    if Path(text).expanduser().exists():  # a comma may be part of a file's name
        return [text]
    return [part.strip() for part in text.removeprefix("[").removesuffix("]").split(",") if part.strip()]


def _integer(key: str, text: str) -> int:
    try:
        return int(text.replace("_", "").replace(",", ""))
    except ValueError as e:
        raise UserError(f"{key}={text!r} is not a whole number") from e


def _number(key: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as e:
        raise UserError(f"{key}={text!r} is not a number") from e


def _switch(key: str, text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise UserError(f"{key}={text!r} is not true or false")
    return text.lower() == "true"
