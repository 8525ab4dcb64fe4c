"""Execute notebooks in place: those named, else every one under nbs/ except reports and benchmarks.

Tutorials run from nothing, so that what they show is what a newcomer sees.
"""
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from tqdm import tqdm

TUTORIALS = '00_tutorials'


def notebooks():
    "Notebooks under nbs/ whose outputs are kept."
    for path in sorted(Path('nbs').rglob('*.ipynb')):
        hidden = any(part[0] in '._' for part in path.parts)
        if not hidden and (path.parent.name == TUTORIALS or not (path.parent/'.notest').exists()):
            yield path


def execute(path):
    "Run one notebook in its own folder and store its outputs."
    nb = nbformat.read(path, as_version=4)
    place = {'metadata': {'path': str(path.parent)}}
    with tempfile.TemporaryDirectory() as home:
        if path.parent.name == TUTORIALS:
            os.environ['EHR_R1_HOME'] = home
        NotebookClient(nb, timeout=3600, kernel_name='python3', resources=place).execute()
        os.environ.pop('EHR_R1_HOME', None)
    nbformat.write(nb, path)


if __name__ == '__main__':
    os.environ['TQDM_DISABLE'] = '1'  # for the kernels: a bar's steps are not worth keeping
    named = [Path(name) for name in sys.argv[1:]]
    for notebook in (bar := tqdm(named or list(notebooks()))):
        bar.set_description(str(notebook))
        execute(notebook)
