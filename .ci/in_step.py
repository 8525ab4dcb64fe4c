"""Fail where notebooks, library and README are out of step, or a notebook is not clean. Works on a copy; changes nothing."""
import filecmp, os, shutil, subprocess, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = ('nbs', 'ehr_r1', 'docs', '.ci', 'settings.ini', 'pyproject.toml', 'README.md')

def files(root):
    "Relative names of the files that are compared."
    return {p.relative_to(root).as_posix() for top in KEPT for p in ([root/top] if (root/top).is_file() else (root/top).rglob('*'))
            if p.is_file() and not {'__pycache__', '.ipynb_checkpoints'} & set(p.parts)}

def run(folder, command):
    "Run one of this environment's commands in a folder."
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | {'PYTHONPATH': str(folder), 'PYTHONDONTWRITEBYTECODE': '1'}
    subprocess.run([Path(sys.executable).parent/command[0], *command[1:]], cwd=folder, check=True, stdout=subprocess.DEVNULL, env=env)

def differences(root=ROOT):
    "Names of files that a fresh export, clean and README would change, add or leave out."
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp)/'copy'
        for name in files(root):
            (copy/name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root/name, copy/name)
        for module in (copy/'ehr_r1').rglob('*.py'): module.unlink()   # a module without a notebook must not survive
        for command in (['nbdev_export'], ['nbdev_clean'], ['python', 'docs/readme.py']): run(copy, command)
        before, after = files(root), files(copy)
        return sorted((before ^ after) | {n for n in before & after if not filecmp.cmp(root/n, copy/n, shallow=False)})

if __name__ == '__main__':
    found = differences()
    for name in found: print(f'out of step or not clean: {name}')
    if found: print('make notebooks (or nbdev_export, nbdev_clean and make readme) puts them right')
    sys.exit(bool(found))
