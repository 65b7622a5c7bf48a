"""Fetch a URL into a file, with a progress bar."""

from __future__ import annotations

import errno
import http.client
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from nib.common.exits import InputError, RunError
from nib.common.wording import counted

TIMEOUT = 30  # seconds without a byte
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def download(url: str, path: Path, expected_bytes: int | None = None) -> None:
    """Fetch `url` into `path`.

    Raises InputError for a URL that cannot be opened or a size that is not `expected_bytes`, RunError when the
    connection is cut.
    """
    from tqdm import tqdm

    size = 0
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "nib", "Accept-Encoding": "identity"})
        with (
            urllib.request.urlopen(request, timeout=TIMEOUT) as answer,
            tqdm(desc=f"fetching {url}", unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar,
            path.open("wb") as file,
        ):
            total = bar.total = answer.length  # None where the server does not say it
            while block := answer.read1(1 << 20):
                size += file.write(block)
                bar.update(len(block))
    except urllib.error.HTTPError as error:
        reason = f"the server says {error.code} {error.reason}"
        raise InputError(f"cannot fetch {url}: {reason}. Check the URL and the network") from None
    except (ValueError, http.client.InvalidURL) as error:
        raise InputError(f"{url} is not a URL: {error}. Write http(s)://HOST/PATH") from None
    except (http.client.HTTPException, OSError) as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        kind = RunError if size else InputError
        raise kind(f"cannot fetch {url}: {str(error) or type(error).__name__}. Check the URL and the network") from None
    if total is not None and size < total:
        raise RunError(f"cannot fetch {url}: the connection was cut. Check the network and run again")
    if expected_bytes is not None and size != expected_bytes:
        raise InputError(f"{url} has {counted(size, 'byte')}, not the expected {expected_bytes}. Download it by hand")


def url_path(url: str) -> Path:
    """The path in a URL. Raises InputError for an invalid URL."""
    try:
        return Path(urllib.parse.urlsplit(url).path)
    except ValueError as error:
        raise InputError(f"{url} is not a URL: {error}. Write http(s)://HOST/PATH") from None
