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

OTHER_KINDS = [
    'rows.json', 'notes.txt', 'case.html', 'x.jsonl.1', 'x.parquet.bak', 'x.avro', 'x.dta', 'x.log', 'x.sav', 'X.CSV',
    'notes', 'a.md', 'nbs/notes.md', 'nbs/exploration.ipynb', 'nbs/02_data/rows.json', 'tests/rows.txt',
    'docs/case.html', 'ehr_r1/data/rows.json', '.ci/rows.csv', 'reports/demo/notes.txt', 'reports/demo/more/a.csv',
    'reports/a.csv']

@pytest.mark.parametrize('name', OTHER_KINDS)
def test_what_is_not_expected_is_refused_with_the_remedy(refusal, name):
    why = refusal(name, b'x')
    assert 'reports are committed for' in why or f'.ci/allowed.txt, "{name} WHY"' in why

def test_file_is_allowed_on_purpose_by_path_and_reason(refusal):
    refusal('.ci/allowed.txt', b'# path why\ndocs/case.html\nnotes.md how to write to us\nruns/a.md why not\n')
    assert refusal('docs/case.html', b'x')  # no reason is given
    assert refusal('runs/a.md', b'x')
    assert refusal('notes.md', b'x') is None
    assert 'KiB' in refusal('notes.md', bytes(1025*1024))

CODE_FILES = ['ehr_r1/data/library/conditions.csv', 'README.md', 'tests/test_x.py', 'Makefile']

@pytest.mark.parametrize('name', CODE_FILES)
def test_code_passes(refusal, name):
    assert refusal(name, b'x') is None

def test_big_file_is_refused(refusal):
    big = bytes(1025*1024)
    assert 'KiB' in refusal('docs/_static/figure.svg', big)

KEPT = 'ehr_r1/training/kept'

@pytest.mark.parametrize('access, passes', [('open', True), ('credentialed', False), ('', False)])
def test_the_base_that_is_kept_must_have_read_open_records(refusal, tmp_path, access, passes):
    (tmp_path/KEPT).mkdir(parents=True)
    (tmp_path/KEPT/'manifest.json').write_text(json.dumps(dict(access=access)))
    assert (refusal(f'{KEPT}/model.safetensors', bytes(8_000*1024)) is None) == passes
    assert 'KiB' in refusal(f'{KEPT}/model.safetensors', bytes(9_001*1024))
    assert refusal(f'{KEPT}/more/model.safetensors', b'x')

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
    notebook(tmp_path/'nbs/02_data/01_x.ipynb', 'access: credentialed')
    notebook(tmp_path/'nbs/02_data/02_y.ipynb', 'access: open')
    assert refusal('nbs/02_data/01_x.ipynb')
    assert refusal('nbs/02_data/02_y.ipynb') is None

NOTE = 'Name: ___  Unit No: ___\nHistory of Present Illness: patient 10000032 ...'
SHOWN = {
    'a note': dict(output_type='stream', name='stdout', text=NOTE),
    'its lines': dict(output_type='stream', name='stdout', text=NOTE.splitlines(True)),
    'a page': dict(output_type='display_data', metadata={}, data={
        'text/html': ['<p><b>Chief Complaint</b>: fever</p>']}),
    'a value': dict(output_type='execute_result', metadata={}, data={'text/plain': repr(NOTE)}),
    'an error': dict(output_type='error', ename='E', evalue='', traceback=['Discharge Diagnosis: sepsis']),
    'a patient': dict(output_type='stream', name='stdout', text='subject_id 15312477'),
    'a row': dict(output_type='stream', name='stdout', text='(15312477, 23814529)'),
    'a table': dict(output_type='execute_result', metadata={}, data={
        'text/html': ['<th>subject_id</th>\n', '<td>15312477</td>']}),
    'what it is': dict(output_type='stream', name='stdout', text='rows: 3\naccess: credentialed'),
    'a dict': dict(output_type='execute_result', metadata={}, data={'text/plain': "{'access': 'credentialed'}"}),
    'in a table': dict(output_type='execute_result', metadata={}, data={
        'text/html': '<td>access</td><td>credentialed</td>'})}

def shows(path, output, source='show()'):
    "A notebook with this output."
    cell = dict(cell_type='code', metadata={}, source=source, outputs=[output], execution_count=None)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(cells=[cell], **FORMAT)))

@pytest.mark.parametrize('what', SHOWN)
def test_lesson_that_shows_a_patient_is_refused(refusal, tmp_path, what):
    shows(tmp_path/'nbs/02_data/01_x.ipynb', SHOWN[what])
    assert refusal('nbs/02_data/01_x.ipynb')

MADE = ['build_hospital(folder, 40)', 'open_source(demo_folder())', 'text = "Name: ___ Chief Complaint:"']

@pytest.mark.parametrize('source', MADE)
def test_lesson_may_show_what_it_makes(refusal, tmp_path, source):
    shows(tmp_path/'nbs/02_data/01_x.ipynb', SHOWN['a note'], source)
    assert refusal('nbs/02_data/01_x.ipynb') is None

@pytest.mark.parametrize('what', ['a patient', 'a row', 'a table'])
def test_stranger_is_found_in_a_lesson_on_the_hospital_and_in_a_report(refusal, tmp_path, what):
    "The tables may be others than the code says: EHR_R1_DEMO names them."
    shows(tmp_path/'nbs/02_data/01_x.ipynb', SHOWN[what], 'open_source(demo_folder())')
    assert '15312477' in refusal('nbs/02_data/01_x.ipynb')
    notebook(tmp_path/'reports/demo/01.ipynb', 'access: open')
    assert '15312477' in refusal('reports/demo/a.csv', b'subject_id,age\n15312477,50\n')

NO_STRANGERS = [
    '10000032 is a patient', '10632452 rows', '13310758 rows of 100 patients', 'patient_id: 0.12345678',
    'mean 15,312,477']

@pytest.mark.parametrize('said', NO_STRANGERS)
def test_number_that_is_no_stranger_passes(refusal, tmp_path, said):
    shows(tmp_path/'nbs/02_data/01_x.ipynb', dict(output_type='stream', name='stdout', text=said))
    assert refusal('nbs/02_data/01_x.ipynb') is None

def test_broken_notebook_is_refused(refusal):
    assert 'cannot be read' in refusal('nbs/02_data/01_x.ipynb', b'{"cells": [')

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
    'reports/demo/a.ipynb', 'reports/demo/a.png', 'reports/study/a.csv', 'nbs/a.ipynb', 'ehr_r1/data/a.csv',
    f'{KEPT}/metrics.jsonl', f'{KEPT}/model.safetensors']

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
