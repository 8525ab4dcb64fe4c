"Whatever the rows of one patient hold, those of the others come out the same."
import random
import shutil

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import at, row, store

from ehr_r1.config import Run
from ehr_r1.data.events import DISPLAY
from ehr_r1.data.index import index_rows
from ehr_r1.data.samples import Record, by_patient
from ehr_r1.data.table_files import TableError
from ehr_r1.data.tables import open_source
from ehr_r1.data.trajectories import build_trajectories, read_manifest, scan_trajectories
from ehr_r1.hospital.hospital import build_hospital
from ehr_r1.profiles import profile

WRONG = ('', '0', '-1', '1', '1e308', 'nan', '0001-01-01 00:00:00', '1900-01-01 00:00:00', '1900-01-01',
         '2999-12-31 23:59:59', '2150-06-01', 'x', '99999999', 'None', 'line\nbreak', '## Labs [2150-01-01 00:00]')


# -- dates and numbers, by hand ----------------------------------------------------------------------------------------

def two_patients(first, second):
    "Rows of patients 1 and 2 from descriptions."
    return [row(*args, subject=subject, **names)
            for subject, rows in ((1, first), (2, second)) for args, names in rows]


OWN = [
    (('patients', None, None, ['60.0', 'F']), {}),
    (('admissions', at(1, 8), 7, ['EW EMER.']), dict(until=at(9))),
    (('icustays', at(1, 9), 7), dict(until=at(8), stay=5)),
    (('labevents', at(1, 10), 7, ['Sodium']), {}),
    (('services', at(1, 20), 7, ['MED']), {}),
]


@pytest.mark.parametrize('strays', [
    [(('labevents', at(-100_000), None, ['Sodium']), {})],
    [(('labevents', at(300_000), None, ['Sodium']), {})],
    [(('admissions', at(1, 3), 7, ['ELECTIVE']), dict(until=at(2), died=at(2)))],
    [(('services', at(1, 12), 7, ['SURG']), {}), (('icustays', at(1, 12), 7), dict(until=at(2), stay=5))],
], ids=['centuries ago', 'centuries later', 'an admission of the same number', 'rows of the same admission'])
@pytest.mark.parametrize('protocol', ['strict', 'official'])
def test_rows_of_another_patient_change_no_sample(strays, protocol):
    other = [(('patients', None, None, ['50.0', 'M']), {}), (('labevents', at(2), 8, ['Lactate']), {})]
    before = index_rows(store(two_patients(OWN, other), protocol), protocol).filter(subject_id=1)
    after = index_rows(store(two_patients(OWN, other + strays), protocol), protocol).filter(subject_id=1)
    assert len(before)
    assert before.equals(after)


# -- any cell of any table ---------------------------------------------------------------------------------------------

SMOKE = profile('smoke', workers=1, shard_patients=100)


@pytest.fixture(scope='module')
def tables(tmp_path_factory):
    "The tables of a dozen patients, as text."
    folder = tmp_path_factory.mktemp('isolation')
    build_hospital(folder/'tables', 12, 3, workers=1, progress=False)
    files = sorted(path for path in (folder/'tables').rglob('*.csv*') if path.name.split('.')[0] in DISPLAY)
    frames = {path: pl.read_csv(path, infer_schema=False) for path in files}
    return folder, {path: frame for path, frame in frames.items() if len(frame)}


def made(folder, name):
    "Trajectories, index and prompts by patient."
    run = Run(name, folder)
    shutil.rmtree(run.folder, ignore_errors=True)
    build_trajectories(open_source(folder/'tables'), run, SMOKE)
    rows = scan_trajectories(run.trajectories).collect()
    index = index_rows(rows, 'strict')
    integers = read_manifest(run.trajectories)['counts']['integers']
    texts = {}
    for subject, own in by_patient(index).items():
        record = Record(rows.filter(subject_id=subject), 'official', integers)
        some = own.sample(min(12, len(own)), seed=1).iter_rows(named=True)
        texts[subject] = [record.prompt(sample, 0)[0] for sample in some]
    return by_patient(rows), by_patient(index), texts


@pytest.fixture(scope='module')
def before(tables):
    return made(tables[0], 'before')


def spoil(frames, rng, value):
    "One cell of one patient in one table, other than whose row it is: (file, frame, patient)."
    path = rng.choice(sorted(frames))
    frame = frames[path]
    column = rng.choice([name for name in frame.columns if name != 'subject_id'])
    place = rng.randrange(len(frame))
    if value == 'of another':  # an id, or whatever the cell is, of somebody else
        others = frame.filter(pl.col('subject_id') != frame['subject_id'][place])
        value = rng.choice(others[column].to_list() or [''])
    cells = frame[column].to_list()
    cells[place] = value or None
    return path, frame.with_columns(pl.Series(column, cells, dtype=pl.String)), int(frame['subject_id'][place])


def put(path, frame):
    "Write a table where its file was."
    plain = path.with_suffix('') if path.suffix == '.gz' else path
    path.unlink()
    frame.write_csv(plain)
    return plain


TRIED = []


@settings(max_examples=24)
@given(seed=st.integers(0, 10**6), value=st.sampled_from([*WRONG, *['of another']*6]))
def test_a_spoilt_cell_of_one_patient_changes_no_other(tables, before, seed, value):
    folder, frames = tables
    path, frame, patient = spoil(frames, random.Random(seed), value)
    kept = path.read_bytes()
    plain = put(path, frame)
    try:
        after = made(folder, 'after')
        TRIED.append('made')
    except TableError:
        TRIED.append('refused')
        return
    finally:
        plain.unlink()
        path.write_bytes(kept)
    for was, now in zip(before, after):
        for subject in set(was) - {patient}:
            same = was[subject].equals(now[subject]) if isinstance(was[subject], pl.DataFrame) else (
                was[subject] == now[subject])
            assert same, (path.name, patient, subject, value)


def test_most_spoilt_cells_were_read():
    assert TRIED.count('made') >= 8, TRIED
