"""Makes the token that a Ray cluster requires of its clients, in a file that only its owner can read.

Ray would make one that others can read. `python -m distft.cluster.tokens` makes the token for scripts
that call `ray`, and prints the file's name. Ray takes the token from RAY_AUTH_TOKEN, else from the file
RAY_AUTH_TOKEN_PATH, else from ~/.ray/auth_token.
"""

import contextlib
import os
import secrets
import sys
from collections.abc import MutableMapping
from pathlib import Path

from distft.errors import ConfigError, DistftError

_MODE, _TOKEN, _PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_TOKEN_BYTES = 32  # as in Ray's own tokens


def ensure_token(environ: MutableMapping[str, str]) -> Path | None:
    """Make any Ray cluster started with `environ` require a token; returns the token's file, if any.

    Makes a missing file readable for its owner only, and removes other users' permissions from an existing
    one.
    Respects RAY_AUTH_MODE, RAY_AUTH_TOKEN and RAY_AUTH_TOKEN_PATH in `environ`. Raises `ConfigError` if the
    file is empty or cannot be made.
    """
    if environ.get(_MODE, "token").lower() != "token":
        return None
    # Ray reads the mode only once, when it is imported. After that the variable must stay unset:
    # `ray.init(address="local")` then switches tokens on by itself.
    if environ is not os.environ or "ray" not in sys.modules:
        environ.setdefault(_MODE, "token")
    if environ.get(_TOKEN):
        return None
    path = Path(environ.get(_PATH) or _default_path(environ))
    try:
        if not path.exists():
            _make(path)
        if path.stat().st_size == 0:
            raise ConfigError(
                f"{path}, the file for Ray's token, is empty: delete it, and distft makes a new one."
            )
        _restrict_to_owner(path)
    except OSError as error:
        raise ConfigError(
            f"{path}, the file for Ray's token, cannot be used: {error.strerror}. Name another in {_PATH}."
        ) from None
    environ[_PATH] = str(path)
    return path


def _default_path(environ: MutableMapping[str, str]) -> Path:
    home = environ.get("HOME")
    return (Path(home) if home else Path.home()) / ".ray" / "auth_token"


def _make(path: Path) -> None:
    """Make the file atomically, at no time readable by others; keep one that another process has made."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(_TOKEN_BYTES))
        with contextlib.suppress(FileExistsError):
            path.hardlink_to(temporary)
    finally:
        temporary.unlink()


def _restrict_to_owner(path: Path) -> None:
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
