"""Refuse files that must not be committed: data, big files, and notebooks or reports of credentialed data.

A report says `access: open` or `access: credentialed` in an output. A folder of reports in which no notebook says
`open` was vouched for by nobody and counts as credentialed. Names of files are the arguments; any refusal is printed
and the exit code is 1.
"""
import json
import re
import sys
from functools import cache
from pathlib import Path, PurePosixPath

LARGEST = 1024  # KiB; the largest executed report is far smaller
KEPT_REPORTS = ('demo', 'study')
DATA_ENDINGS = (
    'csv tsv parquet feather arrow jsonl ndjson npy npz pkl pickle joblib h5 hdf5 db sqlite duckdb rrf xls xlsx '
    'safetensors pt bin zip tar gz bz2 xz zst'
).split()
# data about data, and tables of open runs
ALLOWED = re.compile(r'^ehr_r1/.*\.csv$|^reports/(demo|study)/[^/]+\.csv$')
ACCESS = re.compile(r'''\baccess['"]?\s*[:=]\s*['"]?(open|credentialed)\b''')


def outputs(file):
    "All text that a notebook's code cells put out."
    cells = json.loads(file.read_text(encoding='utf-8'))['cells']
    found = [output for cell in cells for output in cell.get('outputs', [])]
    return '\n'.join(json.dumps(output, ensure_ascii=False).replace('\\"', '"') for output in found)


def access(file):
    "What a notebook says of the data behind it: a set of 'open' and 'credentialed', empty where it does not vouch."
    return set(ACCESS.findall(outputs(file)))


@cache
def folder_access(folder, changed):
    "The same of all notebooks of a folder, which are read once; `changed` are their times of change."
    return frozenset(word for file in sorted(folder.glob('*.ipynb')) for word in access(file))


def reports_vouched_for(folder):
    "Whether a notebook of the folder says that its data are open, and none says credentialed."
    changed = tuple(file.stat().st_mtime_ns for file in sorted(folder.glob('*.ipynb')))
    return folder_access(folder, changed) == {'open'}


def refused_by_name(name):
    "Why a file of this name is refused, whatever it holds; None if it is not."
    path = PurePosixPath(name)
    if path.parts[0] == 'runs' or 'private' in path.parts:
        return 'runs and private reports stay on this computer'
    if path.suffix.lower().lstrip('.') in DATA_ENDINGS and not ALLOWED.match(name):
        return 'a data file'
    return None


def refused_by_content(name, file, root):
    "Why an existing file is refused for what it is; None if it is not."
    parts = PurePosixPath(name).parts
    if file.stat().st_size > LARGEST*1024:
        return f'{file.stat().st_size//1024} KiB is more than {LARGEST}'
    if parts[0] == 'reports' and parts[1] not in KEPT_REPORTS:
        return 'reports are committed for the runs demo and study only'
    if parts[0] == 'reports' and not reports_vouched_for(root/'reports'/parts[1]):
        return 'no report beside it says `access: open`, or one says credentialed'
    if parts[0] != 'reports' and file.suffix == '.ipynb' and 'credentialed' in access(file):
        return 'an output of credentialed data'
    return None


def refusal(name, root=Path('.')):
    "Why this file must not be committed, or None."
    by_name = refused_by_name(name)
    file = root/name
    if by_name or not file.is_file():
        return by_name
    return refused_by_content(name, file, root)


def main(names):
    "Print every refusal; 1 if there is one."
    refused = {name: why for name in names if (why := refusal(name))}
    for name, why in refused.items():
        print(f'{name}: {why}')
    return bool(refused)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
