"""A process that may use no network: what it looks up, connects to and writes is refused or seen.

In every Python process below it, children too, sockets beyond this machine and names are refused
(as `sitecustomize`, by an audit hook). Where `strace` is there, the system calls of the libraries
themselves are read, too.
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

STRACE = shutil.which("strace")
REFUSE = """
import sys

def refuse(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
        if host not in (None, "", "localhost", "127.0.0.1", "::1", b"127.0.0.1"):
            raise SystemExit(f"refused to look up {host!r}")
    if event in ("socket.connect", "socket.sendto"):
        address = arguments[1]
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1"):
            raise SystemExit(f"refused to connect to {address!r}")

sys.addaudithook(refuse)
"""
CALLS = "trace=connect,sendto,sendmsg,sendmmsg,openat,open,creat,mkdir,mkdirat"
ADDRESS = re.compile(r"sa_family=AF_INET6?\b.*?(?:inet_addr\(|inet_pton\(AF_INET6, )\"([^\"]+)\"")
MADE = re.compile(r'(?:openat\(AT_FDCWD, |open\(|creat\(|mkdir\(|mkdirat\(AT_FDCWD, )"([^"]+)"(.*)')
DEVICES = ("/dev/", "/proc/", "/sys/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a process has done: addresses beyond this machine, and files outside its folders."""

    addresses: set[str]
    files: set[str]


def run_guarded(command, folder, home, **variables):
    """Run a command in a fresh home; returns what it did beyond `folder`.

    folder: a new one; the temporary folder and the caches of processes are in it
    """
    guard = folder / "guard"
    guard.mkdir()
    (guard / "sitecustomize.py").write_text(REFUSE)
    for name in ("tmp", "ours"):
        (folder / name).mkdir()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ORT_", "XDG_"))}
    environment = {
        **kept,
        "HOME": str(home),
        "LATENTRT_CACHE": str(folder / "ours"),
        "TMPDIR": str(folder / "tmp"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join((str(guard), kept.get("PYTHONPATH", ""))),
        **variables,
    }
    log = folder / "calls"
    traced = ["-f", "--seccomp-bpf", "-qq", "-s", "300", "-e", CALLS, "-o", str(log)]
    done = subprocess.run(
        [*((STRACE, *traced) if STRACE else ()), *command],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    left = {str(path) for path in home.rglob("*") if path.is_file()}
    calls = log.read_text(errors="replace").splitlines() if STRACE else []
    return Seen(addresses=set(_addresses(calls)), files=left | set(_made(calls, folder)))


def _addresses(calls):
    for call in calls:
        for address in ADDRESS.findall(call):
            if not address.startswith("127.") and address != "::1":
                yield address


def _made(calls, folder):
    """Yield what was made, or opened to be written, outside the folder."""
    for call in calls:
        found = MADE.search(call)
        if found is None or (call.rstrip().endswith(")") and " = -1 " in call):
            continue
        path, flags = found.groups()
        writes = "mkdir" in call or "creat(" in call or "O_WRONLY" in flags or "O_RDWR" in flags
        failed = " = -1 " in call
        if writes and not failed and not path.startswith((str(folder), *DEVICES)):
            yield path
