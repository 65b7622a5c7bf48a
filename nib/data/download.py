"""Fetch a URL into a file: with a progress bar, resumed where the connection was cut, and checked."""

from __future__ import annotations

import errno
import http.client
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from nib.common.exits import InputError, RunError
from nib.common.wording import counted

ATTEMPTS = 5  # in a row that brought nothing more
TIMEOUT = 30  # seconds without a byte
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def download(url: str, path: Path, expected_bytes: int | None = None) -> int:
    """Fetch `url` into `path` and return its size in bytes.

    A cut connection is resumed with a Range request, as long as the file keeps its size and its ETag or date.
    Raises InputError for a URL that cannot be opened or a size that is not `expected_bytes`, RunError when the
    connection goes down for good.
    """
    from tqdm import tqdm

    path.write_bytes(b"")
    failures = 0
    with tqdm(desc=f"fetching {url}", unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        fetch = _Fetch(url, path, bar)
        while True:
            have = path.stat().st_size
            try:
                fetch.rest(have)
                reason = "the connection was cut"
            except urllib.error.HTTPError as error:
                reason = f"the server says {error.code} {error.reason}"
            except (ValueError, http.client.InvalidURL) as error:
                raise InputError(f"{url} is no URL: {error}. Write http(s)://HOST/PATH") from None
            except (http.client.HTTPException, OSError) as error:
                if isinstance(error, OSError) and error.errno in DISK_FULL:
                    raise
                reason = str(error) or type(error).__name__
            size = path.stat().st_size
            if fetch.complete:
                break
            if have == size == 0:
                raise InputError(f"cannot fetch {url}: {reason}. Check the URL and the network")
            failures = 0 if size > have else failures + 1
            if failures == ATTEMPTS:
                raise RunError(f"cannot fetch {url}: {reason}. Check the network and run again")
            time.sleep(2**failures if failures else 0)
    if expected_bytes is not None and size != expected_bytes:
        raise InputError(
            f"{url} has {counted(size, 'byte')}, not the {expected_bytes} it should have. Fetch it by hand"
        )
    return size


def url_path(url: str) -> Path:
    """The path in a URL. Raises InputError for what is none."""
    try:
        return Path(urllib.parse.urlsplit(url).path)
    except ValueError as error:
        raise InputError(f"{url} is no URL: {error}. Write http(s)://HOST/PATH") from None


class _Fetch:
    """What is known of the file behind a URL from one request to the next."""

    def __init__(self, url: str, path: Path, bar: Any) -> None:
        self.url, self.path, self.bar = url, path, bar
        self.total: int | None = None
        self.version = ""
        self.complete = False

    def rest(self, have: int) -> None:
        """Ask for what follows the first `have` bytes, or for everything when the server does not give parts."""
        headers = {"User-Agent": "nib", "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
            if self.version:
                headers["If-Range"] = self.version
        with urllib.request.urlopen(urllib.request.Request(self.url, headers=headers), timeout=TIMEOUT) as answer:
            start = 0
            if answer.status == 206:
                start = have
                if (
                    self.total is None
                    or answer.headers["Content-Range"] != f"bytes {have}-{self.total - 1}/{self.total}"
                ):
                    self.path.write_bytes(b"")
                    raise ConnectionError("the file has changed on the server")
            self.version = answer.headers["ETag"] or answer.headers["Last-Modified"] or ""
            length = answer.headers["Content-Length"]
            self.total = start + int(length) if length else None
            self.bar.total, self.bar.n = self.total, start
            with open(self.path, "r+b") as file:
                file.truncate(start)
                file.seek(start)
                while block := answer.read1(1 << 20):
                    file.write(block)
                    self.bar.update(len(block))
        self.complete = self.total is None or self.path.stat().st_size == self.total
