"""What holds for the whole repository: import order, module length, what code may not do, and files made from one another."""
import ast
import os
import re
import socket
import subprocess
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from ehr_r1.pipeline import ORDER
from ehr_r1.stages import imported

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {'.'.join(p.relative_to(ROOT/'ehr_r1').with_suffix('').parts): p for p in (ROOT/'ehr_r1').rglob('*.py')
           if p.name not in ('__init__.py', '_modidx.py')}
IGNORED = {'.git', '.venv', '.ipynb_checkpoints', '__pycache__', '_docs', '_proc', 'runs', 'private', 'ehr_r1.egg-info',
           '.pytest_cache', '.hypothesis', '.ruff_cache', 'build'}

def texts():
    "Every text file that could be committed."
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [f for f in folders if f not in IGNORED]
        for name in names:
            path = Path(folder)/name
            if path.suffix in ('.py', '.ipynb', '.md', '.toml', '.csv', '.ini', '.yml', '.yaml', '.cff', '.lock', '.css', '') and path.is_file():
                yield path, path.read_text(encoding='utf-8', errors='ignore')

def reading_order():
    "Modules in the order of their notebooks, by file name, folders included."
    order = []
    for book in sorted((ROOT/'nbs').glob('*/*.ipynb')):
        if found := re.search(r'#\| ?default_exp ([\w.]+)', book.read_text(encoding='utf-8')):
            order.append(found[1])
    return order

BOOKS = reading_order()

def package_of(module):
    "The first part of a module's name; modules without a package are one."
    return module.split('.')[0] if '.' in module else ''

def out_of_order(module, source):
    "The imports of a module that do not stand before it."
    return [m for m in sorted(imported(ast.parse(source), module)) if BOOKS.index(m) >= BOOKS.index(module)]

def test_every_module_has_a_notebook():
    assert sorted(BOOKS) == sorted(SOURCES)

@pytest.mark.parametrize('module', sorted(SOURCES))
def test_module_imports_only_what_stands_before_it(module):
    assert out_of_order(module, SOURCES[module].read_text()) == []

def test_import_order_is_really_checked():
    assert out_of_order('config', 'def f():\n    from ehr_r1 import scoring') == ['scoring']
    assert out_of_order('scoring', 'from .config import Run') == []
    assert out_of_order('data.tasks', 'from . import samples\nfrom ..hospital.notes import x') == ['data.samples', 'hospital.notes']

def test_packages_lean_on_each_other_one_way():
    leans = {(package_of(m), package_of(i)) for m in SOURCES for i in imported(ast.parse(SOURCES[m].read_text()), m)}
    assert [(a, b) for a, b in leans if a != b and a and b and (b, a) in leans] == []

def test_only_the_pipeline_needs_the_hospital():
    needs = {m for m in SOURCES for i in imported(ast.parse(SOURCES[m].read_text()), m) if package_of(i) == 'hospital'}
    assert {m for m in needs if package_of(m) != 'hospital'} == {'pipeline'}

@pytest.mark.parametrize('module', sorted(SOURCES))
def test_module_is_short(module): assert len(SOURCES[module].read_text().splitlines()) < 600

@pytest.mark.parametrize('module', sorted(SOURCES))
def test_module_has_no_long_line(module):
    "But for the first line, the notebook's summary: nbdev writes it, and cannot break it."
    lines = enumerate(SOURCES[module].read_text().splitlines()[1:], 2)
    assert [(n, len(line)) for n, line in lines if len(line) > 130] == []

@pytest.mark.parametrize('module', sorted(SOURCES))
def test_module_runs_no_foreign_code(module):
    tree = ast.parse(SOURCES[module].read_text())
    called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    names = {a.name.split('.')[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {(n.module or '').split('.')[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not called & {'eval', 'exec', 'compile', '__import__'}
    assert not names & {'pickle', 'dill', 'cloudpickle', 'marshal', 'shelve'}
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.ExceptHandler) and n.type is None]

def test_no_path_of_one_computer():
    pattern = re.compile(r'(?<![\w.:/-])/(?:home|root|Users|tmp|work|mnt|opt)/\w+|' + re.escape(str(ROOT)))
    assert [(str(p.relative_to(ROOT)), m[0]) for p, text in texts() if p != Path(__file__) for m in [pattern.search(text)] if m] == []

def test_network_is_closed():
    with pytest.raises(PermissionError): socket.create_connection(('192.0.2.1', 80), timeout=1)
    with pytest.raises(PermissionError): socket.getaddrinfo('example.org', 80)

def make(*words, **env):
    return subprocess.run(['make', *words], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **env})

def test_make_alone_lists_every_target():
    text = (ROOT/'Makefile').read_text()
    phony = re.search(r'^\.PHONY: (.+)$', text, re.M)[1].split()
    listed = re.findall(r'^  ([a-z]+) +\S', make().stdout, re.M)
    assert sorted(phony) == sorted(listed)

def test_make_passes_settings_as_words():
    said = make('-n', 'scores', 'PROFILE=smoke', 'DATA=a folder', 'SET=patients=7').stdout
    assert re.search(r"ehr_r1 index profile='smoke' data='a folder' +patients=7$", said, re.M)
    assert 'ehr_r1 hospital' not in said and 'run=' not in said
    order = re.findall(r'/ehr_r1 (\w+)', make('-n', 'reports').stdout)
    assert order == list(ORDER)
    assert re.findall(r'/ehr_r1 (\w+)', make('-n', 'reproduce').stdout) == ['reproduce'] # the same in one process

def test_make_refuses_an_old_python(tmp_path):
    old = tmp_path/'python'
    old.write_text('#!/bin/sh\necho Python 3.9.1\nexit 1\n')
    old.chmod(0o755)
    r = make('env', f'PYTHON={old}', f'VENV={tmp_path}/venv')
    assert r.returncode and '3.11 or newer' in r.stdout and 'Python 3.9.1' in r.stdout and not (tmp_path/'venv').exists()

def locked():
    "Requirements of the lock that hold on this computer, by name."
    lines = [Requirement(line) for line in (ROOT/'requirements.lock').read_text().splitlines() if line and line[0] != '#']
    return {canonicalize_name(r.name): r for r in lines if r.marker is None or r.marker.evaluate()}

def test_lock_is_exact_and_names_no_host():
    for line in (ROOT/'requirements.lock').read_text().splitlines():
        if not line.startswith('#'): assert re.fullmatch(r'[\w.-]+==[\w.!+]+( ; .+)?', line), line

def test_lock_is_complete(script):
    lock, tool = locked(), script('.ci/lock.py')
    s = tool.settings()
    todo, seen = [Requirement(r) for r in (s['requirements'] + ' ' + s['dev_requirements']).split()], set()
    while todo:
        want = todo.pop()
        name = canonicalize_name(want.name)
        if name in tool.UNUSED or want.marker and not want.marker.evaluate({'extra': ''}): continue
        assert name in lock, f'{want} is not in requirements.lock'
        version = next(iter(lock[name].specifier)).version
        public = SpecifierSet(str(want.specifier).replace('+cpu', '')) # a build for the CPU serves as well
        assert public.contains(version, prereleases=True), f'{want}, but the lock has {version}'
        for extra in {'', *want.extras}:
            if (name, extra) in seen: continue
            seen.add((name, extra))
            wanted = map(Requirement, distribution(name).requires or [])
            todo += [Requirement(str(r).split(';')[0]) for r in wanted if r.marker is None or r.marker.evaluate({'extra': extra})]
    assert {name for name, _ in seen} == set(lock)

def test_environment_is_the_locked_one():
    assert {n: distribution(n).version.removesuffix('+cpu') for n in locked()} == {n: next(iter(r.specifier)).version for n, r in locked().items()}

def test_files_made_from_settings_agree(script):
    lock = script('.ci/lock.py')
    s = lock.settings()
    assert (ROOT/'pyproject.toml').read_text() == lock.pyproject(s)
    assert (ROOT/'environment.yml').read_text() == lock.environment(s, (ROOT/'requirements.lock').read_text())

def test_citation_has_the_version(script):
    assert f"version: {script('.ci/lock.py').settings()['version']}\n" in (ROOT/'CITATION.cff').read_text()
