"""Fail where notebooks, library and README are out of step, or a notebook is not clean.

Works on a copy; changes nothing.
"""
import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = ('nbs', 'ehr_r1', 'docs', '.ci', 'settings.ini', 'pyproject.toml', 'README.md')
LEFT_BEHIND = {'__pycache__', '.ipynb_checkpoints'}
COMMANDS = (['nbdev_export'], ['nbdev_clean'], ['python', 'docs/readme.py'])


def files(root):
    "Relative names of the files that are compared."
    found = []
    for top in KEPT:
        path = root/top
        found += [path] if path.is_file() else path.rglob('*')
    return {p.relative_to(root).as_posix() for p in found if p.is_file() and not LEFT_BEHIND & set(p.parts)}


def run(folder, command):
    "Run one of this environment's commands in a folder."
    env = {key: value for key, value in os.environ.items() if key != 'IN_TEST'}
    env |= {'PYTHONPATH': str(folder), 'PYTHONDONTWRITEBYTECODE': '1'}
    program = Path(sys.executable).parent/command[0]
    subprocess.run([program, *command[1:]], cwd=folder, check=True, stdout=subprocess.DEVNULL, env=env)


def copied(root, copy):
    "Copy what is compared, but no module: one without a notebook must not survive."
    for name in files(root):
        (copy/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root/name, copy/name)
    for module in (copy/'ehr_r1').rglob('*.py'):
        module.unlink()
    return copy


def differences(root=ROOT):
    "Names of files that a fresh export, clean and README would change, add or leave out."
    with tempfile.TemporaryDirectory() as folder:
        copy = copied(root, Path(folder)/'copy')
        for command in COMMANDS:
            run(copy, command)
        before, after = files(root), files(copy)
        changed = {name for name in before & after if not filecmp.cmp(root/name, copy/name, shallow=False)}
        return sorted((before ^ after) | changed)


def main():
    "Print what is out of step; 1 if anything is."
    found = differences()
    for name in found:
        print(f'out of step or not clean: {name}')
    if found:
        print('make notebooks (or make export) puts them right')
    return bool(found)


if __name__ == '__main__':
    sys.exit(main())
