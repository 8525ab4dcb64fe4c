"""Write pyproject.toml, requirements.lock and environment.yml from the lists in settings.ini (make lock).

The lock keeps the versions it has unless settings.ini rules them out; `python .ci/lock.py --upgrade` takes the newest.
"""
import configparser
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# vllm asks for them; text needs none, and only builds for GPUs exist
UNUSED = ('torchvision', 'torchaudio', 'torchcodec')


def settings():
    "The one section of settings.ini."
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT/'settings.ini', encoding='utf-8')
    return parser['DEFAULT']


def pins(lock):
    "The requirement lines of a lock's text."
    return [line for line in lock.splitlines() if line.strip() and not line.startswith('#')]


def listed(names):
    "Names as a TOML list, one a line."
    return '[\n' + ''.join(f'    {json.dumps(name)},\n' for name in names) + ']'


PYPROJECT = '''# Made from settings.ini by .ci/lock.py (make lock): edit that file instead.
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name="{lib_name}"
requires-python=">={min_python}"
dynamic = ["version"]
description = {description}
readme = "README.md"
license = "Apache-2.0"
license-files = ["LICENSE"]
authors = [{{name = {author}, email = {author_email}}}]
keywords = {keywords}
classifiers = ["Intended Audience :: {audience}", "Programming Language :: Python :: 3"]
dependencies = {requirements}

[project.optional-dependencies]
dev = {dev_requirements}

[project.scripts]
{command} = "{target}"

[project.urls]
Repository = "{git_url}"
Documentation = "{doc_host}{doc_baseurl}"

[project.entry-points.nbdev]
{lib_name} = "{lib_path}._modidx:d"

[tool.setuptools.dynamic]
version = {{attr = "{lib_path}.__version__"}}

[tool.setuptools.packages.find]
include = ["{lib_path}*"]

[tool.setuptools.package-data]
"*" = ["*.toml", "*.csv", "*.yaml"]

# nbdev 3 looks here, nbdev 2.4 in settings.ini
[tool.nbdev]
{nbdev}

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
# made from notebooks, which are checked themselves: an import there may serve the examples alone;
# nbdev breaks `__all__` at 120 characters without counting what stands in front of it
"ehr_r1/**/*.py" = ["I001", "E402", "E501", "F401", "F811"]
'''
NBDEV = dict(nbs_path=str, doc_path=str, recursive=bool, tst_flags=str, put_version_in_init=bool, jupyter_hooks=bool,
             clean_ids=bool, clear_all=bool, skip_procs=list, allowed_cell_metadata_keys=list, branch=str,
             custom_sidebar=bool, title=str)  # settings that nbdev 3 knows, and what they are there


def nbdev_lines(section):
    "The settings of nbdev, as nbdev 3 reads them."
    read = {str: str, list: str.split, bool: lambda text: text == 'True'}
    values = {name: read[kind](section[name]) for name, kind in NBDEV.items()}
    return '\n'.join(f'{name} = {json.dumps(value)}' for name, value in values.items())


def pyproject(section):
    "The text of pyproject.toml; name and requires-python are spelt the way nbdev_export rewrites them."
    command, target = re.split(r'\s*=\s*', section['console_scripts'])
    quoted = {name: json.dumps(section[name]) for name in ('description', 'author', 'author_email')}
    lists = {name: listed(section[name].split()) for name in ('requirements', 'dev_requirements')}
    keywords = json.dumps(section['keywords'].split())
    fields = dict(section) | quoted | lists | dict(keywords=keywords, command=command, target=target)
    return PYPROJECT.format(**fields, nbdev=nbdev_lines(section))


ENVIRONMENT = '''# Made from requirements.lock by .ci/lock.py (make lock).
# conda env create -f environment.yml && conda activate {name} && pip install --no-deps --no-build-isolation -e .
name: {name}
channels: [conda-forge]
dependencies:
  - python>={python}
  - pip
  - pip:
'''


def environment(section, lock):
    "The text of environment.yml: conda brings Python, pip brings what the lock names."
    head = ENVIRONMENT.format(name=section['lib_name'], python=section['min_python'])
    return head + ''.join(f'    - {line}\n' for line in pins(lock))


def resolve(section, lock, options):
    "Have uv write the lock for every platform and Python from min_python on; needs the network."
    wanted = (section['requirements'] + ' ' + section['dev_requirements']).split()
    command = [sys.executable, '-m', 'uv', 'pip', 'compile', '-', '--universal', '--quiet']
    command += ['--no-header', '--no-annotate', '--output-file', str(lock)]
    command += ['--python-version', section['min_python'], *options]
    with tempfile.TemporaryDirectory() as folder:
        unused = Path(folder)/'unused.txt'
        unused.write_text(''.join(f"{name} ; python_version < '3'\n" for name in UNUSED))
        env = {**os.environ, 'UV_CUSTOM_COMPILE_COMMAND': 'make lock'}
        command += ['--override', str(unused)]
        subprocess.run(command, input='\n'.join(wanted), text=True, check=True, cwd=ROOT, env=env)


def compile_lock(section, *options):
    "Write requirements.lock; its text."
    lock = ROOT/'requirements.lock'
    resolve(section, lock, options)
    # whichever build of torch the machine's index has
    lines = [re.sub(r'(torch==[\d.]+).*', r'\1', line) for line in pins(lock.read_text())]
    head = '# Exact versions of everything, made from settings.ini by .ci/lock.py (make lock).\n'
    text = head + '\n'.join(dict.fromkeys(lines)) + '\n'
    lock.write_text(text)
    return text


def main(options):
    "Write the three files."
    section = settings()
    (ROOT/'pyproject.toml').write_text(pyproject(section))
    (ROOT/'environment.yml').write_text(environment(section, compile_lock(section, *options)))


if __name__ == '__main__':
    main(sys.argv[1:])
