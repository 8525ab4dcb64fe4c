"""Execute notebooks in place: those named, else every one under nbs/ except folders with a .notest file."""
import sys
from pathlib import Path
import nbformat
from nbclient import NotebookClient
from tqdm import tqdm

names = [Path(n) for n in sys.argv[1:]] or [p for p in sorted(Path('nbs').rglob('*.ipynb'))
    if not (p.parent/'.notest').exists() and not any(part[0] in '._' for part in p.parts)]
for path in (bar := tqdm(names)):
    bar.set_description(str(path))
    nb = nbformat.read(path, as_version=4)
    NotebookClient(nb, timeout=3600, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}}).execute()
    nbformat.write(nb, path)
