"""Fetch one URL into one file: ``python _download.py URL FILE``, with the standard library alone.

A program of its own because only a process can be given up at any point: nothing in Python interrupts the
look-up of a host's name, and a thread left behind would go on writing.
"""

import sys
import urllib.error
import urllib.request

# an orphan whose parent was killed ends too
_SOCKET_TIMEOUT = 60.0
# more than twice the largest file of Fashion-MNIST; a host that never ends must not fill the disk
_LARGEST = 64 << 20


def download(url: str, path: str) -> None:
    """Write what `url` serves to the new file `path`.

    Parameters
    ----------
    url : str
        http or https.
    path : str
        Must not exist yet.

    Raises
    ------
    OSError
        If the host cannot be reached or refuses, the file cannot be written, or it grows past 64 MiB.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "fastdl"})
    with (
        urllib.request.urlopen(request, timeout=_SOCKET_TIMEOUT) as response,
        open(path, "xb", buffering=0) as file,
    ):
        # read1 hands on what has arrived, so that the file's size shows the progress
        while chunk := response.read1(1 << 16):
            file.write(chunk)
            if file.tell() > _LARGEST:
                raise OSError(f"the file is larger than {_LARGEST >> 20} MiB")


if __name__ == "__main__":
    try:
        download(*sys.argv[1:])
    except urllib.error.HTTPError as error:
        sys.exit(f"the host answered {error.code} {error.reason}")
    except urllib.error.URLError as error:
        sys.exit(str(error.reason))
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")
