"""Fetch a URL into a file: with a progress bar, taken up again where the connection was cut, and checked."""

from __future__ import annotations

import http.client
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from nib.errors import InputError, RunError

ATTEMPTS = 5  # in a row that brought nothing
TIMEOUT = 30  # seconds without a byte


def download(url: str, path: Path, expected_bytes: int | None = None, pause: float = 1.0) -> int:
    """Fetch `url` into `path` and return its size in bytes.

    A cut connection is resumed with a Range request as long as the file stays the same one (its ETag or date).
    Raises InputError for a URL the server refuses or a size that is not `expected_bytes`, RunError when the
    connection fails `ATTEMPTS` times in a row, `pause` seconds apart and each time twice as long.
    """
    from tqdm import tqdm

    path.write_bytes(b"")
    total, version, failures = None, "", 0
    with tqdm(desc=f"fetching {url}", unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        while True:
            have = path.stat().st_size
            headers = {"User-Agent": "nib", "Accept-Encoding": "identity"}
            if have and version:
                headers |= {"Range": f"bytes={have}-", "If-Range": version}
            reason = "the connection was cut"
            try:
                request = urllib.request.Request(url, headers=headers)
                with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                    resumed = answer.status == 206 and _range_start(answer.headers.get("Content-Range")) == have
                    version = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
                    length = answer.headers.get("Content-Length")
                    start = have if resumed else 0
                    total = start + int(length) if length and length.isdigit() else None
                    bar.total, bar.n = total, start
                    with open(path, "r+b") as file:
                        file.truncate(start)
                        file.seek(start)
                        while block := answer.read1(1 << 20):
                            file.write(block)
                            bar.update(len(block))
            except urllib.error.HTTPError as error:
                if error.code < 500:
                    raise InputError(f"{url}: the server says {error.code} {error.reason}. Check the URL") from None
                reason = f"the server says {error.code} {error.reason}"
            except (ValueError, http.client.InvalidURL) as error:
                raise InputError(f"{url} is no URL: {error}. Write http(s)://HOST/PATH") from None
            except http.client.HTTPException as error:
                reason = f"{type(error).__name__} {error}"
            except urllib.error.URLError as error:
                reason = str(error.reason)
            except (TimeoutError, ConnectionError) as error:
                reason = str(error) or type(error).__name__
            size = path.stat().st_size
            if reason == "the connection was cut" and (total is None or size == total):
                break
            failures = 0 if size > have else failures + 1
            if failures == ATTEMPTS:
                raise RunError(f"cannot fetch {url}: {reason}. Check the network and run again")
            time.sleep(pause * 2**failures if failures else 0)
    if expected_bytes is not None and size != expected_bytes:
        raise InputError(f"{url} has {size} bytes, not the {expected_bytes} it should have. Fetch it by hand")
    return size


def _range_start(content_range: str | None) -> int:
    """The 100 of `bytes 100-199/200`; -1 when there is none."""
    start = (content_range or "").removeprefix("bytes ").partition("-")[0]
    return int(start) if start.isdigit() else -1
