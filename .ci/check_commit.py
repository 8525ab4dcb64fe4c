"""Refuse files that must not be committed: data, big files, and notebooks or reports of credentialed data.

A report says `access: open` or `access: credentialed` in an output. A folder of reports in which no notebook says `open` was
vouched for by nobody and counts as credentialed. Names of files are the arguments; any refusal is printed and the exit code is 1.
"""
import json, re, sys
from pathlib import Path, PurePosixPath

LARGEST = 1024  # KiB; the largest executed report is far smaller
DATA = re.compile(r'\.(csv|tsv|parquet|feather|arrow|jsonl|ndjson|npz?|pkl|pickle|joblib|h5|hdf5|db|sqlite|duckdb|rrf|xlsx?|safetensors|pt|bin|zip|tar|gz|bz2|xz|zst)$', re.I)
ALLOWED = re.compile(r'^ehr_r1/.*\.csv$|^reports/(demo|study)/[^/]+\.csv$')  # data about data, and tables of open runs
ACCESS = re.compile(r'''\baccess['"]?\s*[:=]\s*['"]?(open|credentialed)\b''')

def outputs(file):
    "All text that a notebook's code cells put out."
    cells = json.loads(file.read_text(encoding='utf-8'))['cells']
    return '\n'.join(json.dumps(o, ensure_ascii=False).replace('\\"', '"') for c in cells for o in c.get('outputs', []))

def access(files):
    "What the notebooks say of the data behind them: a set of 'open' and 'credentialed', empty where nobody vouched."
    return {word for f in files for word in ACCESS.findall(outputs(f))}

def refusal(name, root=Path('.')):
    "Why this file must not be committed, or None."
    path, file = PurePosixPath(name), root/name
    if path.parts[0] == 'runs' or 'private' in path.parts: return 'runs and private reports stay on this computer'
    if DATA.search(name) and not ALLOWED.match(name): return 'a data file'
    if not file.is_file(): return None
    if file.stat().st_size > LARGEST*1024: return f'{file.stat().st_size//1024} KiB is more than {LARGEST}'
    if path.parts[0] == 'reports':
        if path.parts[1] not in ('demo', 'study'): return 'reports are committed for the runs demo and study only'
        if access((root/'reports'/path.parts[1]).glob('*.ipynb')) != {'open'}: return 'no report beside it says `access: open`, or one says credentialed'
    elif path.suffix == '.ipynb' and 'credentialed' in access([file]): return 'an output of credentialed data'

if __name__ == '__main__':
    refused = [(name, why) for name in sys.argv[1:] if (why := refusal(name))]
    for name, why in refused: print(f'{name}: {why}')
    sys.exit(bool(refused))
