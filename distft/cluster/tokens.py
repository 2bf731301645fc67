"""The token that a Ray cluster asks of everybody: made before Ray makes one, which others could read.

`python -m distft.cluster.tokens` makes it for the `ray` commands of a script, and prints its file's name.

Ray takes the token from RAY_AUTH_TOKEN, else from the file RAY_AUTH_TOKEN_PATH, else from ~/.ray/auth_token.
"""

import contextlib
import os
import secrets
import sys
from collections.abc import MutableMapping
from pathlib import Path

from distft.errors import ConfigError, DistftError

_MODE, _TOKEN, _PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_TOKEN_BYTES = 32  # as many as Ray's own


def ensure_token(environ: MutableMapping[str, str]) -> Path | None:
    """Have any Ray that a process with `environ` starts ask for a token; returns its file, if it has one.

    A file that is missing is made for its owner's eyes only, and one of the owner's that others can read is
    closed to them. What `environ` says stands: another RAY_AUTH_MODE, RAY_AUTH_TOKEN, or another file.
    Raises `ConfigError` where the file cannot be made or holds nothing.
    """
    if environ.get(_MODE, "token").lower() != "token":
        return None
    # Ray reads the mode once, when it is imported. From then on only `ray.init(address="local")` sets it,
    # where it is not set.
    if environ is not os.environ or "ray" not in sys.modules:
        environ.setdefault(_MODE, "token")
    if environ.get(_TOKEN):
        return None
    path = Path(environ.get(_PATH) or _default_path(environ))
    try:
        if not path.exists():
            _make(path)
        if path.stat().st_size == 0:
            raise ConfigError(f"{path} is to hold Ray's token, and is empty: delete it, and it is made anew.")
        _close_to_others(path)
    except OSError as error:
        raise ConfigError(
            f"{path}, for Ray's token, cannot be used: {error.strerror}. Name another file in {_PATH}."
        ) from None
    environ[_PATH] = str(path)
    return path


def _default_path(environ: MutableMapping[str, str]) -> Path:
    home = environ.get("HOME")
    return (Path(home) if home else Path.home()) / ".ray" / "auth_token"


def _make(path: Path) -> None:
    """Whole or not at all, and never readable by others; whoever comes second takes the first one's."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(_TOKEN_BYTES))
        with contextlib.suppress(FileExistsError):
            path.hardlink_to(draft)
    finally:
        draft.unlink()


def _close_to_others(path: Path) -> None:
    status = path.stat()
    if status.st_uid == os.getuid() and status.st_mode & 0o077:
        path.chmod(0o600)


def main() -> int:
    """The command; returns the exit code."""
    try:
        path = ensure_token(dict(os.environ))
    except DistftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if path is not None:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
