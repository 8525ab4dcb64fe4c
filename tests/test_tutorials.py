"The tutorials run from nothing, as JupyterLab would run them, and leave the repository as it was."
import os
import subprocess
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TUTORIALS = sorted(Path('nbs/00_tutorials').glob('*.ipynb'))


@pytest.mark.parametrize('path', TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs_from_nothing(path, tmp_path, monkeypatch):
    monkeypatch.setenv('EHR_R1_HOME', str(tmp_path))
    monkeypatch.setenv('TQDM_DISABLE', '1')
    notebook = nbformat.read(path, as_version=4)
    place = {'metadata': {'path': str(path.parent)}}
    NotebookClient(notebook, timeout=600, kernel_name='python3', resources=place).execute()
    assert list(tmp_path.glob('runs/*')), 'it made a run'
    assert not subprocess.run(['git', 'status', '--porcelain', '-uall', 'nbs'], capture_output=True, text=True,
                              check=True).stdout.count('?? nbs/00_tutorials')


@pytest.mark.parametrize('path', TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_holds_what_it_shows(path):
    "Its outputs are stored, none of them is an error or a bar, and it can be opened by name of its kernel."
    notebook = nbformat.read(path, as_version=4)
    assert notebook.metadata.kernelspec.name == 'python3'
    outputs = [output for cell in notebook.cells for output in cell.get('outputs', [])]
    assert len(outputs) > 4
    for output in outputs:
        assert output.output_type != 'error'
        assert output.get('name') != 'stderr', output.text


@pytest.mark.parametrize('path', TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_links_to_the_next(path):
    text = path.read_text()
    following = TUTORIALS[(TUTORIALS.index(path) + 1) % len(TUTORIALS)]
    assert following is TUTORIALS[0] or following.name in text


def test_no_path_of_a_machine_is_stored():
    for path in TUTORIALS:
        assert os.path.expanduser('~') not in path.read_text().replace('"~"', '')
