"""The checks that guard a commit: no data, nothing big, nothing of credentialed data; notebooks and library in step."""
import json
import os
import shutil
import subprocess
import sys

import pytest

FORMAT = dict(metadata={}, nbformat=4, nbformat_minor=5)

def notebook(path, text=None):
    "A notebook with one cell whose output is the text."
    output = dict(output_type='stream', name='stdout', text=[text])
    outputs = [] if text is None else [output]
    cell = dict(cell_type='code', metadata={}, source=['1'], outputs=outputs, execution_count=None)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(cells=[cell], **FORMAT)))

@pytest.fixture
def refusal(script, tmp_path):
    "Why a file is refused, or None; it is written first where its content is given."
    check = script('.ci/check_commit.py')

    def ask(name, content=None):
        path = tmp_path/name
        if content is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return check.refusal(name, tmp_path)

    return ask

# --- what may be committed

DATA_FILES = [
    'admissions.csv', 'tests/data/labevents.csv.gz', 'nbs/a.parquet', 'samples.jsonl', 'model.safetensors', 'x.pkl',
    'runs/demo/notes.txt', 'reports/private/x/a.md', 'reports/mimic/a.ipynb', 'UMLS/MRCONSO.RRF']

@pytest.mark.parametrize('name', DATA_FILES)
def test_data_are_refused(refusal, name):
    assert refusal(name, b'x')

CODE_FILES = ['ehr_r1/data/library/conditions.csv', 'README.md', 'tests/test_x.py', 'Makefile']

@pytest.mark.parametrize('name', CODE_FILES)
def test_code_passes(refusal, name):
    assert refusal(name, b'x') is None

def test_big_file_is_refused(refusal):
    big = bytes(1025*1024)
    assert 'KiB' in refusal('figure.png', big)

REPORTS = [
    ('access: open\n', True),
    ('access: credentialed\n', False),
    ("{'access': 'credentialed'}", False),
    (None, False)]

@pytest.mark.parametrize('said, passes', REPORTS)
def test_report_must_say_that_its_data_are_open(refusal, tmp_path, said, passes):
    notebook(tmp_path/'reports/demo/01_cohort.ipynb', said)
    assert (refusal('reports/demo/01_cohort.ipynb') is None) == passes
    assert (refusal('reports/demo/benchmark.csv', b'x') is None) == passes
    assert (refusal('reports/demo/benchmark.png', b'x') is None) == passes

def test_one_credentialed_report_spoils_its_folder(refusal, tmp_path):
    notebook(tmp_path/'reports/demo/01.ipynb', 'access: open')
    notebook(tmp_path/'reports/demo/02.ipynb', 'access: credentialed')
    assert refusal('reports/demo/01.ipynb')
    assert refusal('reports/demo/a.png', b'x')

def test_notebook_with_credentialed_output_is_refused(refusal, tmp_path):
    notebook(tmp_path/'nbs/x.ipynb', 'access: credentialed')
    notebook(tmp_path/'nbs/y.ipynb', 'access: open')
    assert refusal('nbs/x.ipynb')
    assert refusal('nbs/y.ipynb') is None

def test_nothing_here_is_refused(script, root):
    command = ['git', 'ls-files', '--cached', '--others', '--exclude-standard']
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip('not a git checkout')
    check = script('.ci/check_commit.py')
    reasons = {name: check.refusal(name, root) for name in listed.stdout.splitlines()}
    assert {name: why for name, why in reasons.items() if why} == {}

# --- what git ignores

@pytest.fixture
def is_ignored(root, tmp_path):
    "Whether git ignores a file, by the rules of this repository."
    if not shutil.which('git'):
        pytest.skip('no git')
    subprocess.run(['git', 'init', '-q', str(tmp_path)], check=True)
    shutil.copy(root/'.gitignore', tmp_path)

    def ask(name):
        asked = subprocess.run(['git', 'check-ignore', '-q', name], cwd=tmp_path)
        return asked.returncode == 0

    return ask

PRIVATE_FILES = [
    'runs/demo/a', 'reports/private/x/a.md', 'reports/mimic/a.png', 'reports/smoke/a.csv', '_docs/index.html',
    '.venv/x', 'a.parquet']

@pytest.mark.parametrize('name', PRIVATE_FILES)
def test_private_reports_and_runs_are_ignored_by_git(is_ignored, name):
    assert is_ignored(name)

PUBLIC_FILES = [
    'reports/demo/a.ipynb', 'reports/demo/a.png', 'reports/study/a.csv', 'nbs/a.ipynb', 'ehr_r1/data/a.csv']

@pytest.mark.parametrize('name', PUBLIC_FILES)
def test_open_reports_and_code_are_not_ignored_by_git(is_ignored, name):
    assert not is_ignored(name)

# --- notebooks and library in step

def small_project(folder):
    "A project of one notebook, in step and clean."
    sources = ['#| default_exp core', '#| export\ndef one(): return 1']
    cells = []
    for number, source in enumerate(sources):
        lines = source.splitlines(True)
        cell = dict(cell_type='code', metadata={}, source=lines, id=f'c{number}', outputs=[], execution_count=None)
        cells.append(cell)
    title = dict(cell_type='markdown', metadata={}, source=['# x'], id='i')
    (folder/'nbs').mkdir()
    (folder/'nbs/00_core.ipynb').write_text(json.dumps(dict(cells=cells, **FORMAT)))
    (folder/'nbs/index.ipynb').write_text(json.dumps(dict(cells=[title], **FORMAT)))

def test_in_step_finds_what_is_out_of_step(script, root, tmp_path):
    check = script('.ci/in_step.py')
    small_project(tmp_path)
    for name in ('settings.ini', 'pyproject.toml'):
        shutil.copy(root/name, tmp_path)
    for name in ('.ci', 'docs'):
        shutil.copytree(root/name, tmp_path/name, ignore=shutil.ignore_patterns('__pycache__'))
    for command in check.COMMANDS:
        check.run(tmp_path, command)
    assert check.differences(tmp_path) == []
    (tmp_path/'ehr_r1/core.py').write_text('def one(): return 2\n')     # edited by hand
    (tmp_path/'ehr_r1/extra.py').write_text('')                         # no notebook
    (tmp_path/'README.md').write_text('old')
    assert check.differences(tmp_path) == ['README.md', 'ehr_r1/core.py', 'ehr_r1/extra.py']

# --- tests on shared data

@pytest.mark.parametrize('required, outcome', [('1', '1 error'), ('0', '1 skipped')])
def test_no_silent_skip_where_shared_data_are_required(root, tmp_path, required, outcome):
    shutil.copy(root/'tests/conftest.py', tmp_path)
    (tmp_path/'test_x.py').write_text('def test_x(demo): pass\n')
    settings = dict(EHR_R1_REQUIRE_SHARED=required, EHR_R1_DEMO=str(tmp_path/'nowhere'))
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', str(tmp_path)]
    ran = subprocess.run(command, cwd=tmp_path, env=os.environ | settings, capture_output=True, text=True)
    assert outcome in ran.stdout
