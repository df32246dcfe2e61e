"""Install moetrain into a virtual environment and choose its torch. `make train` and `make test` run this first.

Runs on a bare Python 3.8 with nothing installed, so that an old interpreter gets a clear line instead of a traceback.

    python3 launch/install.py                 choose, say what will be downloaded, install
    python3 launch/install.py --dry-run       choose and say it; touch nothing
    python3 launch/install.py --extras dev    what `make test` needs

The virtual environment holds two small files of ours. The stamp says what is installed: while it fits, a run of this
script only compares it. The marker says that an install is under way: found by a later run, it means that the
environment is half-made and is made again.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

from choose_torch import (
    CONSTRAINTS,
    PYPROJECT,
    ROOT,
    Choice,
    Stop,
    Torch,
    choose_build,
    has_nvidia_gpu,
    importable_torch,
    in_range,
    listed_builds,
    pip_arguments,
    pip_environment,
    use_system,
)

CONSTRAINED_PYTHONS = ((3, 11), (3, 12))
STAMP = ".moetrain-installed"
MARKER = ".moetrain-installing"

INSTALLED = """
import json, re
from importlib.metadata import distributions
print(json.dumps(sorted({re.sub(r"[-_.]+", "-", d.metadata["Name"] or "").lower() for d in distributions()})))
"""


# ---- the stamp -------------------------------------------------------------------------------------------------------


def key() -> str:
    """Changes with everything that decides what is installed: pyproject.toml, the constraints, the checkout's place."""
    digest = hashlib.sha256(ROOT.encode())
    for path in (PYPROJECT, CONSTRAINTS):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            digest.update(file.read() + b"\0")
    return digest.hexdigest()


def fingerprint(file: str) -> list[object]:
    """Tells one install of a system's torch from the next without importing it."""
    try:
        status = os.stat(file)
    except OSError:
        return []
    return [file, status.st_size, int(status.st_mtime)]


def read_stamp(venv: str) -> dict:
    try:
        with open(os.path.join(venv, STAMP), encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return {}


@contextlib.contextmanager
def locked(venv: str) -> Iterator[None]:
    """Makes the environment's folder, and one install into it at a time; leaves no empty folder behind."""
    while True:
        os.makedirs(venv, exist_ok=True)
        handle = os.open(venv, os.O_RDONLY)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        with contextlib.suppress(OSError):
            if os.stat(venv).st_ino == os.fstat(handle).st_ino:
                break
        os.close(handle)  # who held it removed a failed install
    try:
        yield
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):
            os.rmdir(venv)


def is_current(venv: str, stamp: dict, args: argparse.Namespace) -> bool:
    return (
        bool(stamp)
        and stamp["key"] == key()
        and set(args.extras) <= set(stamp["extras"])
        and args.torch in ("", stamp["torch_option"])
        and args.python in ("", stamp["python_option"], stamp["python"])
        and stamp["system_torch"] == (fingerprint(stamp["system_torch"][0]) if stamp["system_torch"] else [])
        and os.access(os.path.join(venv, "bin", "python"), os.X_OK)
        and not os.path.exists(os.path.join(venv, MARKER))
    )


# ---- the environment -------------------------------------------------------------------------------------------------


def check_interpreter() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036  (this file alone also runs on older ones, to say so)
        for name in ("python3.12", "python3.11", "python3.13"):
            found = shutil.which(name)
            if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
                raise Stop(f"moetrain needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}. "
                           f"{name} is here: say PYTHON={name}")  # fmt: skip
        raise Stop(
            f"moetrain needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}. Install one "
            "(apt-get install python3.12 python3.12-venv) and say PYTHON=python3.12"
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        v = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise Stop(
            f"{sys.executable} has no {error.name}: apt-get install python3-venv (or python{v}-venv), or name another "
            "interpreter with PYTHON=..."
        ) from None


def why_unfit(venv: str, *, system: bool) -> str:
    """Why an existing environment cannot be installed into, or ''."""
    settings = {}
    with contextlib.suppress(OSError), open(os.path.join(venv, "pyvenv.cfg"), encoding="utf-8") as file:
        settings = dict(line.lower().split(" = ", 1) for line in file.read().splitlines() if " = " in line)
    if not settings:
        return "it is not a virtual environment"
    if (settings.get("include-system-site-packages") == "true") != system:
        return f"it {'does not see' if system else 'sees'} the system's packages"
    ask = "import sys, pip; print(*sys.version_info[:2])"
    done = subprocess.run([os.path.join(venv, "bin", "python"), "-c", ask], capture_output=True, text=True) if (
        os.access(os.path.join(venv, "bin", "python"), os.X_OK)
    ) else None  # fmt: skip
    if done is None or done.returncode:
        return "its Python or its pip does not start"
    if done.stdout.split() != [str(sys.version_info[0]), str(sys.version_info[1])]:
        return f"its Python is {done.stdout.strip().replace(' ', '.')}"
    return ""


def make_venv(venv: str, *, system: Torch | None) -> None:
    """Empties the folder, but for the marker, and makes the environment in it; it sees the system's torch if given."""
    for name in os.listdir(venv):
        path = os.path.join(venv, name)
        if name != MARKER:
            shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.remove(path)
    flags = ["--system-site-packages"] if system else []
    done = subprocess.run([sys.executable, "-m", "venv", *flags, venv], capture_output=True, text=True)
    if done.returncode:
        last = [*(done.stdout + done.stderr).strip().splitlines(), "no message"][-1]
        raise Stop(f"{sys.executable} could not make {venv} (apt-get install python3-venv?): {last}")
    if system is None:
        return
    python = os.path.join(venv, "bin", "python")
    seen = importable_torch(python)
    if seen is None or seen.file != system.file:
        # PYTHON is itself a virtual environment: --system-site-packages shows its base's packages, not its own.
        packages = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
        ).stdout.strip()
        with open(os.path.join(packages, "moetrain-system-torch.pth"), "w", encoding="utf-8") as file:
            file.write(os.path.dirname(os.path.dirname(system.file)) + "\n")


def requirements(extras: list[str]) -> tuple[list[str], list[str]]:
    """pyproject.toml's requirements without torch, those of the extras included; and the names that `dev` asks for."""
    import tomllib

    with open(PYPROJECT, "rb") as file:
        project = tomllib.load(file)["project"]
    optional = project["optional-dependencies"]
    unknown = [extra for extra in extras if extra not in optional]
    if unknown:
        raise Stop(f"no extra is called {unknown[0]!r}: there are {', '.join(optional)}")
    wanted = [*project["dependencies"], *(r for extra in extras for r in optional[extra])]
    names = [re.split(r"[^\w.-]", r)[0].lower() for r in optional["dev"]]
    return [r for r in wanted if not re.match(r"torch\b(?!-)", r)], names


def write_constraints(venv: str, *, keep_installed: bool) -> str | None:
    """Copies CI's versions without torch (chosen here), and without what the system has (kept as it is); dev tools
    stay pinned, since their verdicts depend on their version. None where CI's versions do not apply."""
    if not os.path.exists(CONSTRAINTS):
        return None
    if sys.version_info[:2] not in CONSTRAINED_PYTHONS:
        print("versions: the newest that fit (constraints/ci.txt is for Python 3.11 and 3.12)")
        return None
    drop = {"torch"}
    if keep_installed:
        out = subprocess.run([os.path.join(venv, "bin", "python"), "-c", INSTALLED], capture_output=True, text=True)
        drop |= set(json.loads(out.stdout or "[]")) - set(requirements([])[1])
    with open(CONSTRAINTS, encoding="utf-8") as file:
        lines = [x for x in file.read().splitlines() if re.sub(r"[-_.]+", "-", x.split("==")[0]).lower() not in drop]
    path = os.path.join(venv, "constraints.txt")
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    return path


def pip_install(venv: str, choice: Choice, extras: list[str]) -> None:
    command = [os.path.join(venv, "bin", "python"), "-m", "pip", "install", "--no-input"]
    command += ([] if sys.stdout.isatty() else ["-q"]) + pip_arguments()
    env = pip_environment(isolated=not choice.system)
    project = f".[{','.join(extras)}]" if extras else "."
    if choice.system:
        # pip is never told about torch: it would not count 2.11.0a0 as >=2.11, and would fetch another.
        steps = [requirements(extras)[0], ["--no-deps", "-e", "."]]
    else:
        steps = [[choice.requirement, "-e", project]]
    constraints = write_constraints(venv, keep_installed=choice.system)
    for step in steps:
        for pins in (["-c", constraints], []) if constraints else ([],):
            sys.stdout.flush()
            code = subprocess.run([*command, *pins, *step], cwd=ROOT, env=env, stdin=subprocess.DEVNULL).returncode
            if code == 0:
                break
            if pins:
                print("versions: those of constraints/ci.txt cannot all be installed here: trying without them")
        else:
            raise Stop("pip could not install what moetrain needs (its message is above); nothing was recorded")


def install(args: argparse.Namespace, venv: str, stamp: dict) -> None:
    start = time.monotonic()
    option = args.torch or stamp.get("torch_option", "auto")
    extras = sorted({*args.extras, *stamp.get("extras", [])})
    requirements(extras)
    system = importable_torch(sys.executable) if option in ("auto", "system") else None
    take, lines = use_system(option, system)
    if not take:
        system = None
    print(f"python: {sys.version.split()[0]} ({sys.executable})")

    interrupted = os.path.exists(os.path.join(venv, MARKER))
    empty = not os.path.isdir(venv) or not os.listdir(venv)
    unfit = "interrupted" if interrupted or empty else why_unfit(venv, system=take)
    ours = interrupted or empty or stamp.get("ours", False)
    if stamp and stamp["root"] != ROOT:
        unfit = unfit or f"it was installed for {stamp['root']}"
    if unfit and not ours and not args.dry_run:
        raise Stop(f"{venv} was not made by this script and does not fit: {unfit}. Remove it, or say VENV=...")
    kept = None if unfit or take else importable_torch(os.path.join(venv, "bin", "python"))

    def choose(python: str) -> Choice:
        if system is not None:
            return Choice(True, "", [*lines, f"torch: using the system's {system} (nothing downloaded)"])
        wrong = kept is not None and ((option == "cuda" and not kept.cuda) or (option == "cpu" and kept.cuda))
        if kept is not None and in_range(kept.version) and not wrong:
            return Choice(False, f"torch=={kept.version}", [*lines, f"torch: {kept} is already in {venv}, and stays"])
        requirement, line = choose_build(option, has_nvidia_gpu(), listed_builds(python))
        return Choice(False, requirement, [*lines, line])

    if args.dry_run:
        print(*choose(sys.executable).lines, sep="\n")
        return

    if ours:
        open(os.path.join(venv, MARKER), "w").close()
    try:
        if unfit:
            print(f"environment: {venv} ({'made again: ' + unfit if stamp or interrupted else 'new'})", flush=True)
            make_venv(venv, system=system)
        choice = choose(os.path.join(venv, "bin", "python"))
        print(*choice.lines, sep="\n", flush=True)
        pip_install(venv, choice, extras)
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(venv, STAMP))
        got = importable_torch(os.path.join(venv, "bin", "python"))
        if got is None or (system is not None and got.file != system.file):
            raise Stop(f"after the install, torch is {got} at {got.file if got else '-'}, not {system or 'importable'}")
    except BaseException as error:
        if unfit and ours:
            shutil.rmtree(venv, ignore_errors=True)
        elif isinstance(error, Stop) and os.path.exists(os.path.join(venv, STAMP)):
            with contextlib.suppress(FileNotFoundError):  # pip changed nothing: what was installed still works
                os.remove(os.path.join(venv, MARKER))
        raise

    if has_nvidia_gpu() and not got.cuda:
        print(f"torch: a GPU is here, but {got.version} cannot use it; say TORCH=cuda to replace it")
    content = {
        "key": key(),
        "root": ROOT,
        "extras": extras,
        "torch": got.version,
        "torch_option": option,
        "python": sys.executable,
        "python_option": args.python,
        "system_torch": fingerprint(system.file) if system else [],
        "ours": ours,
    }
    with open(os.path.join(venv, STAMP + ".new"), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
    os.replace(os.path.join(venv, STAMP + ".new"), os.path.join(venv, STAMP))
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(venv, MARKER))
    print(f"installed in {time.monotonic() - start:.0f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Install moetrain into a virtual environment and choose its torch.")
    parser.add_argument("--venv", default=".venv", help="the virtual environment's folder")
    parser.add_argument("--torch", default="", help="auto, system, cpu or cuda; empty: as installed, or auto")
    parser.add_argument("--python", default="", help="what the user said in PYTHON=, which also runs this script")
    parser.add_argument("--extras", default="", help="comma-separated, as in pyproject.toml")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done; touch nothing")
    args = parser.parse_args()
    args.extras = [extra for extra in re.split(r"[,\s]+", args.extras) if extra]
    venv = os.path.join(ROOT, args.venv)
    stamp = read_stamp(venv)
    if is_current(venv, stamp, args) and not args.dry_run:
        return 0
    try:
        if args.torch not in ("", "auto", "system", "cpu", "cuda"):
            raise Stop(f"TORCH={args.torch} is none of auto, system, cpu, cuda")
        if os.path.realpath(sys.prefix) == os.path.realpath(venv):
            # The environment is activated: what makes it again must be the Python that it was made from.
            base = os.path.join(sys.base_prefix, "bin", f"python{sys.version_info[0]}.{sys.version_info[1]}")
            os.execv(base, [base, *sys.argv])
        recorded = stamp.get("python", "")
        if not args.python and recorded not in ("", sys.executable) and os.access(recorded, os.X_OK):
            os.execv(recorded, [recorded, *sys.argv])
        check_interpreter()
        if args.dry_run:
            install(args, venv, stamp)
            return 0
        with locked(venv):
            stamp = read_stamp(venv)
            if not is_current(venv, stamp, args):
                install(args, venv, stamp)
    except Stop as stop:
        print(f"moetrain: {stop}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("moetrain: interrupted; nothing was recorded", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
