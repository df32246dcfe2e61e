"""Secrets taken out of what a run writes down: environments, diffs, any text.

By name, whatever the value; by value, whatever the name; and in a text also every value that the environment has under
such a name. What is not recognised is not taken out: a secret without a telling name or shape passes.
"""

import os
import re
from collections.abc import Mapping

REDACTED = "<redacted>"
_NAMES = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|NETRC|^AWS_|_PAT$|_AUTH$|_PSW$|_PWD$", re.IGNORECASE)
_WANDB = r"(?:local-)?[0-9a-fA-F]{40}(?![0-9A-Za-z])|wandb_v\d+_\w{20,}"
_KEYS = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    rf"|(?<![0-9A-Za-z])(?:{_WANDB}"
    r"|hf_[0-9A-Za-z]{20,}|A[KS]IA[0-9A-Z]{16}|gh[pousr]_[0-9A-Za-z]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|sk-[\w-]{20,}|xox[abprs]-[\w-]{10,}|AIza[\w-]{35}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)",
    re.DOTALL,
)
_IN_URL = re.compile(r"(?<=://)[^\s/@:]*:[^\s/@]+(?=@)")
_ASSIGNED = re.compile(
    r"""([\w.-]*(?:key|token|secret|passw\w*)[\w.-]*["']?\s*[=:]\s*["']?)([0-9A-Za-z+/_=.~-]{16,})""", re.IGNORECASE
)
_SHORTEST = 8
"""Characters of a value that is looked for in texts: one that is shorter may be a word like any other."""


def looks_like_key(value: str) -> bool:
    """Whether a value is of the shape of an API key of W&B, or another well-known one."""
    return _KEYS.search(value) is not None


def suspicious(name: str) -> bool:
    """Whether an environment variable of that name is taken to hold a secret."""
    return _NAMES.search(name) is not None


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """What may be written down of an environment, sorted by name: of a suspicious name only that it is set."""
    return {
        name: REDACTED if suspicious(name) and value else redact(value, variables)
        for name, value in sorted(variables.items())
    }


def redact(text: str, variables: Mapping[str, str] | None = None) -> str:
    """The text without what looks like a secret; ``variables``: the environment whose secrets are looked for too."""
    found = os.environ if variables is None else variables
    secrets = {value for name, value in found.items() if suspicious(name) and len(value) >= _SHORTEST}
    for value in sorted(secrets, key=len, reverse=True):
        text = text.replace(value, REDACTED)
    text = _IN_URL.sub(REDACTED, _KEYS.sub(REDACTED, text))
    return _ASSIGNED.sub(lambda m: m[1] + (REDACTED if _random(m[2]) else m[2]), text)


def _random(value: str) -> bool:
    """Digits among letters: no word, name or number."""
    return any(c.isdigit() for c in value) and any(c.isalpha() for c in value)
