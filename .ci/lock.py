"""Write pyproject.toml, requirements.lock and environment.yml from the lists in settings.ini (make lock).

The lock keeps the versions it has unless settings.ini rules them out; `python .ci/lock.py --upgrade` takes the newest.
"""
import configparser, json, os, re, subprocess, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

def settings():
    "The one section of settings.ini."
    cfg = configparser.ConfigParser(interpolation=None)
    cfg.read(ROOT/'settings.ini', encoding='utf-8')
    return cfg['DEFAULT']

def pins(lock):
    "The requirement lines of a lock's text."
    return [line for line in lock.splitlines() if line.strip() and not line.startswith('#')]

def pyproject(s):
    "The text of pyproject.toml; name and requires-python are spelt the way nbdev_export rewrites them."
    lines = lambda names: '[\n' + ''.join(f'    {json.dumps(n)},\n' for n in names) + ']'
    command, target = re.split(r'\s*=\s*', s['console_scripts'])
    return f'''# Made from settings.ini by .ci/lock.py (make lock): edit that file instead.
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name="{s['lib_name']}"
requires-python=">={s['min_python']}"
dynamic = ["version"]
description = {json.dumps(s['description'])}
readme = "README.md"
license = "Apache-2.0"
license-files = ["LICENSE"]
authors = [{{name = {json.dumps(s['author'])}, email = {json.dumps(s['author_email'])}}}]
keywords = {json.dumps(s['keywords'].split())}
classifiers = ["Intended Audience :: {s['audience']}", "Programming Language :: Python :: 3"]
dependencies = {lines(s['requirements'].split())}

[project.optional-dependencies]
dev = {lines(s['dev_requirements'].split())}

[project.scripts]
{command} = "{target}"

[project.urls]
Repository = "{s['git_url']}"
Documentation = "{s['doc_host']}{s['doc_baseurl']}"

[project.entry-points.nbdev]
{s['lib_name']} = "{s['lib_path']}._modidx:d"

[tool.setuptools.dynamic]
version = {{attr = "{s['lib_path']}.__version__"}}

[tool.setuptools.packages.find]
include = ["{s['lib_path']}*"]

[tool.setuptools.package-data]
"*" = ["*.toml", "*.csv", "*.yaml"]

[tool.pytest.ini_options]
testpaths = ["tests"]

[tool.ruff]
line-length = 120
target-version = "py311"
src = ["."]
extend-exclude = ["_proc", "_docs", "runs", "reports", "ehr_r1/_modidx.py"]

[tool.ruff.lint]
# statements one a line, no assigned lambdas, lines of 120 characters; names; likely faults; order of imports
select = ["E", "F", "B", "I"]
# zip(strict=) beside every zip of two columns says nothing
ignore = ["B905"]

[tool.ruff.lint.per-file-ignores]
# made by nbdev_export, which turns the sorted absolute imports of a notebook into relative ones
"ehr_r1/**/*.py" = ["I001", "E402"]
'''

def environment(s, lock):
    "The text of environment.yml: conda brings Python, pip brings what the lock names."
    return (f'''# Made from requirements.lock by .ci/lock.py (make lock).
# conda env create -f environment.yml && conda activate {s['lib_name']} && pip install --no-deps --no-build-isolation -e .
name: {s['lib_name']}
channels: [conda-forge]
dependencies:
  - python>={s['min_python']}
  - pip
  - pip:
''' + ''.join(f'    - {line}\n' for line in pins(lock)))

UNUSED = ('torchvision', 'torchaudio', 'torchcodec') # vllm asks for them; text needs none, and only builds for GPUs exist

def compile_lock(s, *options):
    "Resolve the lists for every platform and Python from min_python on; needs the network."
    lock = ROOT/'requirements.lock'
    wanted = '\n'.join((s['requirements'] + ' ' + s['dev_requirements']).split())
    cmd = [sys.executable, '-m', 'uv', 'pip', 'compile', '-', '--universal', '--python-version', s['min_python'],
           '--no-header', '--no-annotate', '--quiet', '--output-file', str(lock), *options]
    with tempfile.TemporaryDirectory() as folder:
        unused = Path(folder)/'unused.txt'
        unused.write_text(''.join(f"{name} ; python_version < '3'\n" for name in UNUSED))
        subprocess.run([*cmd, '--override', str(unused)], input=wanted, text=True, check=True, cwd=ROOT,
                       env={**os.environ, 'UV_CUSTOM_COMPILE_COMMAND': 'make lock'})
    head = '# Exact versions of everything, made from settings.ini by .ci/lock.py (make lock).\n'
    lines = [re.sub(r'(torch==[\d.]+).*', r'\1', line) for line in pins(lock.read_text())] # whichever build of it the machine's index has
    text = head + '\n'.join(dict.fromkeys(lines)) + '\n'
    lock.write_text(text)
    return text

if __name__ == '__main__':
    s = settings()
    (ROOT/'pyproject.toml').write_text(pyproject(s))
    (ROOT/'environment.yml').write_text(environment(s, compile_lock(s, *sys.argv[1:])))
