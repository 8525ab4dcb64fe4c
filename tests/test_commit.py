"""The checks that guard a commit: no data, nothing big, nothing of credentialed data; notebooks and library in step."""
import json
import os
import shutil
import subprocess
import sys

import pytest


def notebook(path, text=None):
    "A notebook with one cell whose output is the text."
    out = [] if text is None else [{'output_type': 'stream', 'name': 'stdout', 'text': [text]}]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({'cells': [{'cell_type': 'code', 'metadata': {}, 'source': ['1'], 'outputs': out, 'execution_count': None}],
                                'metadata': {}, 'nbformat': 4, 'nbformat_minor': 5}))

@pytest.fixture
def refusal(script, tmp_path):
    check = script('.ci/check_commit.py')
    def ask(name, content=None):
        if content is not None:
            (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path/name).write_bytes(content)
        return check.refusal(name, tmp_path)
    return ask

@pytest.mark.parametrize('name', ['admissions.csv', 'tests/data/labevents.csv.gz', 'nbs/a.parquet', 'samples.jsonl', 'model.safetensors',
                                  'x.pkl', 'runs/demo/notes.txt', 'reports/private/x/a.md', 'reports/mimic/a.ipynb', 'UMLS/MRCONSO.RRF'])
def test_data_are_refused(refusal, name): assert refusal(name, b'x')

@pytest.mark.parametrize('name', ['ehr_r1/data/library/conditions.csv', 'README.md', 'tests/test_x.py', 'Makefile'])
def test_code_passes(refusal, name): assert refusal(name, b'x') is None

def test_big_file_is_refused(refusal): assert 'KiB' in refusal('figure.png', bytes(1025*1024))

@pytest.mark.parametrize('said, passes', [('access: open\n', True), ('access: credentialed\n', False), ("{'access': 'credentialed'}", False), (None, False)])
def test_report_must_say_that_its_data_are_open(refusal, tmp_path, said, passes):
    notebook(tmp_path/'reports/demo/01_cohort.ipynb', said)
    for name in ('reports/demo/01_cohort.ipynb', 'reports/demo/benchmark.csv', 'reports/demo/benchmark.png'):
        if not name.endswith('ipynb'): (tmp_path/name).write_bytes(b'x')
        assert (refusal(name) is None) == passes

def test_one_credentialed_report_spoils_its_folder(refusal, tmp_path):
    notebook(tmp_path/'reports/demo/01.ipynb', 'access: open')
    notebook(tmp_path/'reports/demo/02.ipynb', 'access: credentialed')
    assert refusal('reports/demo/01.ipynb') and refusal('reports/demo/a.png', b'x')

def test_notebook_with_credentialed_output_is_refused(refusal, tmp_path):
    notebook(tmp_path/'nbs/x.ipynb', 'access: credentialed')
    notebook(tmp_path/'nbs/y.ipynb', 'access: open')
    assert refusal('nbs/x.ipynb') and refusal('nbs/y.ipynb') is None

def test_nothing_here_is_refused(script, root, monkeypatch):
    names = subprocess.run(['git', 'ls-files', '--cached', '--others', '--exclude-standard'], cwd=root, capture_output=True, text=True)
    if names.returncode: pytest.skip('not a git checkout')
    check = script('.ci/check_commit.py')
    assert [(n, why) for n in names.stdout.splitlines() if (why := check.refusal(n, root))] == []

def test_private_reports_and_runs_are_ignored_by_git(root, tmp_path):
    if not shutil.which('git'): pytest.skip('no git')
    subprocess.run(['git', 'init', '-q', str(tmp_path)], check=True)
    shutil.copy(root/'.gitignore', tmp_path)
    ignored = lambda name: subprocess.run(['git', 'check-ignore', '-q', name], cwd=tmp_path).returncode == 0
    assert all(map(ignored, ['runs/demo/a', 'reports/private/x/a.md', 'reports/mimic/a.png', 'reports/smoke/a.csv', '_docs/index.html', '.venv/x', 'a.parquet']))
    assert not any(map(ignored, ['reports/demo/a.ipynb', 'reports/demo/a.png', 'reports/study/a.csv', 'nbs/a.ipynb', 'ehr_r1/data/a.csv']))

def small_project(folder):
    "A project of one notebook, in step and clean."
    cells = [('code', '#| default_exp core'), ('code', '#| export\ndef one(): return 1')]
    nb = {'cells': [{'cell_type': t, 'metadata': {}, 'source': s.splitlines(True), 'id': f'c{i}', 'outputs': [], 'execution_count': None}
                    for i, (t, s) in enumerate(cells)], 'metadata': {}, 'nbformat': 4, 'nbformat_minor': 5}
    (folder/'nbs').mkdir()
    (folder/'nbs/00_core.ipynb').write_text(json.dumps(nb))
    (folder/'nbs/index.ipynb').write_text(json.dumps({**nb, 'cells': [{'cell_type': 'markdown', 'metadata': {}, 'source': ['# x'], 'id': 'i'}]}))

def test_in_step_finds_what_is_out_of_step(script, root, tmp_path):
    check = script('.ci/in_step.py')
    small_project(tmp_path)
    for name in ('settings.ini', 'pyproject.toml'): shutil.copy(root/name, tmp_path)
    shutil.copytree(root/'.ci', tmp_path/'.ci', ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copytree(root/'docs', tmp_path/'docs', ignore=shutil.ignore_patterns('__pycache__'))
    for command in check.COMMANDS: check.run(tmp_path, command)
    assert check.differences(tmp_path) == []
    (tmp_path/'ehr_r1/core.py').write_text('def one(): return 2\n')     # edited by hand
    (tmp_path/'ehr_r1/extra.py').write_text('')                         # no notebook
    (tmp_path/'README.md').write_text('old')
    assert check.differences(tmp_path) == ['README.md', 'ehr_r1/core.py', 'ehr_r1/extra.py']

@pytest.mark.parametrize('required, outcome', [('1', '1 error'), ('0', '1 skipped')])
def test_no_silent_skip_where_shared_data_are_required(root, tmp_path, required, outcome):
    shutil.copy(root/'tests/conftest.py', tmp_path)
    (tmp_path/'test_x.py').write_text('def test_x(demo): pass\n')
    env = {**os.environ, 'EHR_R1_REQUIRE_SHARED': required, 'EHR_R1_DEMO': str(tmp_path/'nowhere')}
    r = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', str(tmp_path)], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert outcome in r.stdout
