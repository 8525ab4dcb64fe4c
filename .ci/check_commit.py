"""Refuse files that must not be committed: data, big files, and whatever shows patients of credentialed data.

Only kinds of files that this repository consists of pass, and only where they belong (`PLACES`). Any other file needs
a line in .ci/allowed.txt, its path and why it holds nobody's data, so that who reviews the commit sees both.

What notebooks and reports show is looked at:
- `access: credentialed` in an output is refused anywhere. A folder of reports in which no notebook says `access: open`
  was vouched for by nobody and counts as credentialed.
- A notebook that shows a clinical note must say `access: open`, or make its data itself: its code takes the synthetic
  hospital or the open demo, or has the text in it.
- subject_ids of MIMIC-IV go from 10,000,032 to 19,999,999. The demo's end at 10,040,025, the hospital numbers its
  patients from 10,000,001 on: a number in `STRANGERS` beside a word for patients, or beside an hadm_id or stay_id, is a
  real patient's, unless the notebook's own code has it.

Names of files are the arguments; any refusal is printed and the exit code is 1.
"""
import json
import re
import sys
from functools import cache
from pathlib import Path, PurePosixPath

LARGEST = 1024  # KiB; the largest executed report is far smaller
KEPT_MODEL = PurePosixPath('ehr_r1/training/kept')
LARGEST_WEIGHTS = 9_000  # KiB, of the base that is kept
KEPT_REPORTS = ('demo', 'study')
ALLOWED = '.ci/allowed.txt'
PLACES = [re.compile(place) for place in (
    r'(README|CONTRIBUTING|CHANGELOG)\.md',
    r'(LICENSE|CITATION\.cff|Makefile|settings\.ini|pyproject\.toml|requirements[\w-]*\.lock)',
    r'(environment\.yml|\.gitignore|\.pre-commit-config\.yaml)',
    r'\.ci/(\w+\.py|run|allowed\.txt)',
    r'\.github/ISSUE_TEMPLATE/\w+\.md',
    r'docs/([\w-]+/)*[\w-]+\.(py|css|svg)',
    r'ehr_r1/(\w+/)*\w+\.(py|csv|toml|yaml)',
    r'ehr_r1/training/accelerate/\w+\.sbatch',
    r'ehr_r1/training/kept/\w+\.(json|jsonl|jinja|safetensors)',
    r'nbs/(index\.ipynb|\d\d_\w+/(\d\d_\w+\.ipynb|\.notest))',
    r'tests/\w+\.py',
    r'reports/(demo|study)/[\w.-]+\.(ipynb|csv|png|svg|html|json)')]
TEXTS = ('.ipynb', '.csv', '.html', '.json', '.svg')  # what of reports is read
ACCESS = re.compile(r'''\baccess\b['"]?\s*[:=|,]?\s*['"]?(open|credentialed)\b''', re.I)
STRANGERS = range(10_050_000, 20_000_000)
NUMBER = re.compile(r'(?<![\w.-])1\d{7}(?![\w-]|\.\d)')
BESIDE = re.compile(r'(subject|patient)_?id|\bpatient\W{0,3}1\d{7}|unit no|\bmrn\b'
                    r'|(?<![\w.-])[23]\d{7}(?![\w-]|\.\d)', re.I)
HEADING = re.compile(r'\b(' + '|'.join((
    'Unit No', 'Admission Date', 'Date of Birth', 'Attending', 'Chief Complaint',
    'Major Surgical or Invasive Procedure',
    '(History of )?Present Illness', '(Past Medical|Social|Family) History', 'Physical Exam', 'Pertinent Results',
    'Brief Hospital Course', 'Medications on Admission',
    'Discharge (Medications|Disposition|Diagnosis|Condition|Instructions)')) + r')\s*:', re.I)
BLANK = re.compile(r'(?<!_)___(?!_)')  # stands for what was taken out of a note
MADE_UP = re.compile(r'build_hospital|demo_folder|ehr_r1\.hospital|default_exp hospital|Reproduction\(')


def strings(value):
    "Every text in a JSON value; lines that a notebook keeps apart are put together."
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        if all(isinstance(part, str) for part in value):
            yield ''.join(value)
        else:
            for part in value:
                yield from strings(part)
    elif isinstance(value, dict):
        for name, part in value.items():
            if not name.startswith('image/') or name == 'image/svg+xml':
                yield name
                yield from strings(part)


def shown(text):
    "A text as a reader sees it: without tags."
    return re.sub('<[^>]*>', ' ', text)


@cache
def read_notebook(file, changed):
    "The texts that a notebook shows beside its cells, and what stands in these; `changed` is when the file was."
    cells = json.loads(file.read_text(encoding='utf-8'))['cells']
    beside = [[cell.get('outputs', []), cell.get('attachments', {})] for cell in cells]
    found = [shown(text) for text in strings(beside)]
    sources = [''.join(cell['source']) for cell in cells]
    return found, '\n'.join(sources)


def outputs(file):
    "All text that a notebook's code cells put out."
    return '\n'.join(read_notebook(file, file.stat().st_mtime_ns)[0])


def access(file):
    "What a notebook says of the data behind it: a set of 'open' and 'credentialed', empty where it does not vouch."
    return {word.lower() for word in ACCESS.findall(outputs(file))}


def reports_vouched_for(folder):
    "Whether a notebook of the folder says that its data are open, and none says credentialed."
    return {word for file in sorted(folder.glob('*.ipynb')) for word in access(file)} == {'open'}


def strangers(text, source=''):
    "Numbers that can only be a real patient's, unless they stand in the source."
    found = {number for number in NUMBER.findall(text) if int(number) in STRANGERS and number not in source}
    return found if BESIDE.search(text) else set()


def shows_patients(file):
    "Why what a notebook shows may be somebody's; None if nothing speaks for it."
    texts, source = read_notebook(file, file.stat().st_mtime_ns)
    text, said = '\n'.join(texts), access(file)
    if 'credentialed' in said:
        return 'an output of credentialed data'
    if found := {number for each in texts for number in strangers(each, source)}:
        return f'an output has {min(found)}, no patient of the demo or the hospital: clear it, or make it again'
    if said or MADE_UP.search(source):
        return None
    notes = {match[0] for match in HEADING.finditer(text) if match[0] not in source} or BLANK.search(text)
    if notes and not BLANK.search(source):
        return ("an output reads like a clinical note, and the notebook does not make it: "
                "show what the synthetic hospital or the demo has, or clear the output")
    return None


def allowed_on_purpose(root):
    "Paths that .ci/allowed.txt names with a reason."
    file = root/ALLOWED
    lines = file.read_text(encoding='utf-8').splitlines() if file.is_file() else []
    words = [line.split(None, 1) for line in lines if not line.startswith('#')]
    return {pair[0] for pair in words if len(pair) == 2}


def refused_by_name(name, root):
    "Why a file of this name is refused, whatever it holds; None if it is not."
    path = PurePosixPath(name)
    if path.parts[0] == 'runs' or 'private' in path.parts:
        return 'runs and private reports stay on this computer'
    if path.parts[0] == 'reports' and (len(path.parts) < 3 or path.parts[1] not in KEPT_REPORTS):
        return 'reports are committed for the runs demo and study only'
    if any(place.fullmatch(name) for place in PLACES) or name in allowed_on_purpose(root):
        return None
    return (f'files of this kind may hold data and do not belong here; if it holds nobody\'s, '
            f'write a line into {ALLOWED}, "{name} WHY", and commit both')


def refused_by_content(name, file, root):
    "Why an existing file is refused for what it is; None if it is not."
    parts, is_kept = PurePosixPath(name).parts, PurePosixPath(name).parent == KEPT_MODEL
    most = LARGEST_WEIGHTS if is_kept else LARGEST
    if file.stat().st_size > most*1024:
        return f'{file.stat().st_size//1024} KiB is more than {most}'
    if is_kept and json.loads((root/KEPT_MODEL/'manifest.json').read_text()).get('access') != 'open':
        return 'what a model read must be open: its manifest does not say so'
    if parts[0] == 'reports' and not reports_vouched_for(root/'reports'/parts[1]):
        return 'no report beside it says `access: open`, or one says credentialed'
    if file.suffix == '.ipynb':
        return shows_patients(file)
    if parts[0] == 'reports' and file.suffix in TEXTS:
        if found := strangers(shown(file.read_text(encoding='utf-8', errors='replace'))):
            return f'it has {min(found)}, no patient of the demo or the hospital'
    return None


def refusal(name, root=Path('.')):
    "Why this file must not be committed, or None."
    by_name = refused_by_name(name, root)
    file = root/name
    if by_name or not file.is_file():
        return by_name
    try:
        return refused_by_content(name, file, root)
    except (ValueError, KeyError, TypeError) as e:
        return f'it cannot be read as a notebook ({type(e).__name__}: {str(e)[:80]})'


def main(names):
    "Print every refusal; 1 if there is one."
    refused = {name: why for name in names if (why := refusal(name))}
    for name, why in refused.items():
        print(f'{name}: {why}')
    return bool(refused)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
