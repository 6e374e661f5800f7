"""Writes that are either there or not: temporary name, write, fsync, rename, fsync of the folder.

The one home of durability for the guard, the daemon and the trainer; only SQLite does its own.

Everything raises OSError as the system gave it; callers that speak to people translate it (`guard.errors`).
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
from contextlib import suppress
from pathlib import Path

from .json_text import parse_json

PathLike = str | os.PathLike[str]

# Together with the process id this makes a temporary name that no living process of this machine can share.
_temp_numbers = itertools.count()


def write_atomic(path: PathLike, data: bytes | str, *, mode: int = 0o644, temp_dir: PathLike | None = None) -> None:
    """Replace `path` by `data`: a reader sees the old bytes or the new ones, also after a power cut.

    `mode` is cut by the umask. `temp_dir` (default: the folder of `path`) holds the temporary file and must
    be on the same file system; a process killed half way leaves that file behind, named `.NAME.PID-N.tmp`.
    """
    target = Path(path)
    payload = data.encode() if isinstance(data, str) else data
    temp, fd = _create_temp(Path(temp_dir) if temp_dir is not None else target.parent, target.name, mode)
    try:
        try:
            write_all(fd, payload)
            os.fsync(fd)
        finally:
            os.close(fd)
        temp.replace(target)
    except BaseException:
        with suppress(OSError):
            temp.unlink()
        raise
    fsync_dir(target.parent)


def _create_temp(folder: Path, name: str, mode: int) -> tuple[Path, int]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    while True:
        # A long name is cut so that the temporary one still fits the 255 bytes of a file name.
        temp = folder / f".{name[:50]}.{os.getpid()}-{next(_temp_numbers)}.tmp"
        try:
            return temp, os.open(temp, flags, mode)
        except FileExistsError:
            continue  # left by a dead process that had our process id


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data`: one write(2) may take less than it was given."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def append_or_nothing(fd: int, data: bytes) -> None:
    """Append all of `data` to a file that is open for appending, or none of it. Raises OSError.

    What a full disk took of a line that did not fit is taken back.
    """
    size = os.fstat(fd).st_size
    try:
        write_all(fd, data)
    except OSError:
        with suppress(OSError):  # a device has no length
            os.ftruncate(fd, size)
        raise


def fsync_dir(path: PathLike) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as exc:
        # Some network and FUSE file systems have no fsync for folders; there is nothing better to do there.
        if exc.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def make_folder_durable(path: PathLike, *, mode: int = 0o777) -> None:
    """Make a folder, and those above it that are missing, with durable names; one that exists is left as it is.

    `mode` is cut by the umask.
    """
    folder = Path(path)
    if folder.is_dir():
        return
    make_folder_durable(folder.parent, mode=mode)
    folder.mkdir(mode, exist_ok=True)
    fsync_dir(folder.parent)


def fsync_file(path: PathLike) -> None:
    """Make the bytes of one regular file durable. Anything else (symlink, pipe) is skipped."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as exc:
        if exc.errno in (errno.ELOOP, errno.ENXIO):  # a symlink; a pipe or socket without its other end
            return
        raise
    try:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            os.fsync(fd)
    finally:
        os.close(fd)


def fsync_tree(path: PathLike) -> None:
    """Make a folder durable: files first, then folders from the leaves up. Symlinks are not followed."""
    for folder, _, names in os.walk(path, topdown=False, onerror=_raise):
        for name in names:
            fsync_file(Path(folder, name))
        fsync_dir(folder)


def apply_umask(path: PathLike) -> None:
    """Give every file of a folder the permissions that open(2) would have: rw-rw-rw- less the umask.

    Libraries that write through a private temporary file, as safetensors does, leave 0600. Permissions are added, never
    taken away. Symlinks are not followed.
    """
    umask = os.umask(0o077)  # there is no way to read it alone; meanwhile nothing becomes more open
    os.umask(umask)
    for folder, _, names in os.walk(path, onerror=_raise):
        for name in names:
            file = Path(folder, name)
            mode = file.lstat().st_mode
            wanted = stat.S_IMODE(mode) | (0o666 & ~umask)
            if stat.S_ISREG(mode) and wanted != stat.S_IMODE(mode):
                file.chmod(wanted)


def _raise(error: OSError) -> None:
    raise error


def rename_durable(src: PathLike, dst: PathLike, *, replace: bool = False) -> None:
    """Rename and make both folders durable.

    Raises FileExistsError when `dst` exists (also as a broken symlink), unless `replace` is set: then a file
    or symlink at `dst` gives way in the same step. The caller's lock keeps others from creating `dst` in
    between.
    """
    source, target = Path(src), Path(dst)
    if replace:
        source.replace(target)
    else:
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        source.rename(target)
    fsync_dir(target.parent)
    if source.parent != target.parent:
        fsync_dir(source.parent)


def append_line_durable(path: PathLike, line: str) -> None:
    """Append one line to a JSON-lines file and fsync it.

    An earlier append that a crash cut short is repaired first: a whole JSON value that only lacks its newline
    gets it; anything else was never acknowledged and is moved to `PATH.torn`, so that every line of `path`
    parses.
    """
    if "\n" in line:
        raise ValueError("a line cannot contain a newline")
    target = Path(path)
    existed = os.path.lexists(target)
    fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        prefix = _repair_last_line(fd, target) if existed else b""
        write_all(fd, prefix + line.encode() + b"\n")
        os.fsync(fd)
    finally:
        os.close(fd)
    if not existed:
        fsync_dir(target.parent)


def end_last_line(fd: int) -> None:
    """Let the next append to a file of lines that nobody fsyncs begin a line of its own. `fd` reads, and writes at the end.

    After a power cut the file may end in zeros, which are no content, or within a line. Raises OSError.
    """
    start, tail = last_line(fd)
    content = tail.rstrip(b"\0")
    if len(content) < len(tail):
        os.ftruncate(fd, start + len(content))
    if content:
        write_all(fd, b"\n")


def _repair_last_line(fd: int, path: Path) -> bytes:
    """Return the newline that a whole last line still needs; set a torn one aside."""
    start, tail = last_line(fd)
    if not tail:
        return b""
    try:
        parse_json(tail)
    except ValueError:
        # Copy, then cut: a crash between the two repeats the copy and loses nothing.
        _append_raw(path.with_name(path.name + ".torn"), tail + b"\n")
        os.ftruncate(fd, start)
        return b""
    return b"\n"


def last_line(fd: int) -> tuple[int, bytes]:
    """Where the bytes after the last newline begin, and those bytes."""
    tail, start = b"", os.fstat(fd).st_size
    while start > 0:
        step = min(65_536, start)
        block = os.pread(fd, step, start - step)
        newline = block.rfind(b"\n")
        if newline >= 0:
            return start - step + newline + 1, block[newline + 1 :] + tail
        tail, start = block + tail, start - step
    return 0, tail


def _append_raw(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)
    fsync_dir(path.parent)
