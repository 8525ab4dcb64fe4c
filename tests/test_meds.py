"MEDS: valid by the package's own schemas, nothing lost on the way back, nothing known too early, bad files named."
import hashlib
import json
import os
import shutil
from dataclasses import replace
from datetime import datetime, timedelta

import meds
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import at, random_rows, row, store

import ehr_r1.data.meds as module
from ehr_r1.config import Run
from ehr_r1.data.events import DISPLAY, FIELD
from ehr_r1.data.index import build_index, index_rows
from ehr_r1.data.meds import build_meds, hidden_tables, label_rows, restore_store
from ehr_r1.data.meds_check import check_meds
from ehr_r1.data.meds_rows import DATA, meds_rows, restore_rows
from ehr_r1.data.samples import build_samples, scan_samples
from ehr_r1.data.sampling import SETS, split_of
from ehr_r1.data.table_files import TableError
from ehr_r1.data.tables import open_source
from ehr_r1.data.tasks import BEFORE_ADMISSION, DATE_ONLY, TASKS
from ehr_r1.data.trajectories import build_trajectories, store_files
from ehr_r1.hospital.hospital import build_hospital
from ehr_r1.profiles import profile
from ehr_r1.stages import read_manifest

SEEDS = st.integers(0, 10**6)
BORN = datetime(2080, 1, 1)
MICROSECOND = timedelta(microseconds=1)
PATIENT = row('patients', cells=['60.0', 'F'])


def convert(rows, times='available'):
    "MEDS rows of patients who were all born in 2080."
    born = rows.select('subject_id', born=pl.lit(BORN)).unique()
    return meds_rows(rows, born, times)


# rows there and back

PROTOCOLS = st.sampled_from(['strict', 'official'])
TIMES = st.sampled_from(['available', 'charttime'])
CELLS = st.lists(st.text(max_size=30), max_size=9)


@settings(max_examples=12, deadline=None)
@given(SEEDS, PROTOCOLS, TIMES)
def test_rows_come_back_exactly(seed, protocol, times):
    rows = store(random_rows(seed), protocol)
    made = convert(rows, times)
    assert made['row'].count() == len(rows)
    shuffled = made.sample(fraction=1, shuffle=True, seed=seed % 999)
    assert restore_rows(made).equals(rows)
    assert restore_rows(shuffled).equals(rows)


@settings(max_examples=12, deadline=None)
@given(SEEDS, PROTOCOLS, TIMES)
def test_rows_are_in_order_of_subject_and_time(seed, protocol, times):
    made = convert(store(random_rows(seed), protocol), times)
    assert made['subject_id'].is_sorted()
    for _, patient in made.group_by('subject_id', maintain_order=True):
        assert patient['time'].is_sorted()  # with rows without a time first


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(DISPLAY)), CELLS)
def test_whatever_a_cell_holds_comes_back(table, cells):
    cells = dict(cells=FIELD.join(cells))
    rows = [row('patients'), row(table, at(1), 7) | cells]
    if table == 'patients':
        rows = [row(table) | cells]
    stored = store(rows, 'strict')
    made = convert(stored)
    assert restore_rows(made).equals(stored)
    assert made['code'].null_count() == 0
    assert made['numeric_value'].drop_nulls().is_finite().all()


def test_a_note_stands_in_the_file_once():
    text = f'He left.{FIELD}And came back.'
    note = row('discharge', at(2), 7, ['DS', text])
    rows = [row('patients'), note]
    made = convert(store(rows, 'strict'))
    note = made.filter(pl.col('table') == 'discharge')
    assert note['text_value'].to_list() == [text]
    assert note['cells'].to_list() == ['DS' + FIELD]


@pytest.fixture(scope='module')
def some_rows():
    return convert(store(random_rows(3), 'strict')).with_row_index('place')


def lose(made, place):
    return made.filter(pl.col('place') != place)


def double(made, place):
    return pl.concat([made, made.filter(pl.col('place') == place)])


@pytest.mark.parametrize('spoil', [lose, double])
def test_lost_and_doubled_rows_are_noticed(some_rows, spoil):
    inner = some_rows.filter(pl.col('row') == 2)['place'][0]
    spoilt = spoil(some_rows, inner)
    with pytest.raises(TableError, match='x.parquet, column row: subject 1 has lost or doubled rows'):
        restore_rows(spoilt, 'x.parquet')


# what a row says

def said(rows, *columns):
    "Some columns of the MEDS rows of some events."
    made = convert(store([PATIENT, *rows], 'strict'))
    return made.filter(pl.col('table') != 'patients').select(*columns).rows()


@pytest.mark.parametrize('table, cells, expected', [
    ('labevents',
     dict(item_name='Creatinine', valuenum='1.3', valueuom='mg/dL', comments='hemolysed'),
     ('LAB//RESULT//Creatinine//mg/dL', pytest.approx(1.3), 'hemolysed')),
    ('labevents',
     dict(item_name='Culture', comments='no growth'),
     ('LAB//RESULT//Culture//UNK', None, 'no growth')),
    ('omr', ['BMI (kg/m2)', '24.5'], ('BMI (kg/m2)', 24.5, None)),
    ('omr', ['Blood Pressure', '120/80'], ('Blood Pressure', None, '120/80')),
    ('radiology', ['RR', 'CHEST (PA AND LAT)\x1eKNEE', 'Clear.'],
     ('NOTE//RADIOLOGY//CHEST (PA AND LAT) + KNEE', None, 'Clear.')),
])
def test_codes_and_values(table, cells, expected):
    hadm = None if table == 'omr' else 7
    event = row(table, at(1), hadm, cells)
    assert said([event], 'code', 'numeric_value', 'text_value') == [expected]


@pytest.mark.parametrize('odd', ['nan', 'inf', '1e999', '-inf'])
def test_what_is_no_finite_number_is_none(odd):
    urine = row('outputevents', at(1), 7, ['Urine', odd, 'mL'])
    assert said([urine], 'numeric_value') == [(None,)]


def test_vital_signs_are_rows_of_their_own():
    signs = dict(temperature='98.6', pain='ua', rhythm='Sinus')
    taken = row('vitalsign', at(1), None, signs, stay=3)
    found = said([taken], 'code', 'numeric_value', 'text_value', 'row')
    assert found == [
        ('ED_VITALSIGN', None, 'Sinus', 1),
        ('VITALS//temperature', pytest.approx(98.6), None, None),
        ('VITALS//pain', None, 'ua', None),
    ]


def stays(deathtime=None):
    "A patient with an admission and an ICU stay, dead on the ninth day or at deathtime."
    return store([
        row('patients', cells=['60.0', 'F'], died=at(9)),
        row('admissions', at(1, 9), 7, ['URGENT', 'ED'],
            until=at(3), died=deathtime),
        row('icustays', at(2), 7, until=at(2, 12), stay=4),
    ], 'strict')


def test_stays_have_an_end_and_patients_a_birth_and_a_death():
    assert convert(stays()).select('code', 'time').rows() == [
        ('GENDER//F', None),
        ('MEDS_BIRTH', BORN),
        ('HOSPITAL_ADMISSION//URGENT//ED', at(1, 9)),
        ('ICU_ADMISSION//UNK', at(2)),
        ('ICU_DISCHARGE//UNK', at(2, 12)),
        ('HOSPITAL_DISCHARGE//UNK', at(3)),
        ('MEDS_DEATH', at(10) - timedelta(seconds=1)),
    ]


def test_a_death_has_the_time_of_the_admission_where_it_is_known():
    made = convert(stays(deathtime=at(3)))
    deaths = made.filter(pl.col('code') == 'MEDS_DEATH')
    assert deaths['time'].to_list() == [at(3)]


def test_a_patient_without_a_year_of_birth():
    nobody = pl.DataFrame(dict(subject_id=[2], born=[BORN]))
    made = meds_rows(stays(), nobody, 'available')
    assert 'MEDS_BIRTH' not in made['code']
    assert restore_rows(made).equals(stays())


# when a row is known

DATED = pl.col('table').is_in(DATE_ONLY)


def carried(rows, times='available'):
    "The MEDS rows that stand for a row of the store."
    return convert(rows, times).filter(pl.col('row').is_not_null())


@settings(max_examples=10, deadline=None)
@given(SEEDS)
def test_a_day_is_known_when_it_is_over(seed):
    dated = carried(store(random_rows(seed), 'strict')).filter(DATED)
    assert (dated['time'] - dated['store_time'] == timedelta(days=1)).all()


@settings(max_examples=10, deadline=None)
@given(SEEDS)
def test_a_row_without_time_is_known_when_its_admission_is_over(seed):
    rows = store(random_rows(seed), 'strict')
    made = carried(rows).filter(pl.col('table') != 'patients')
    untimed = made.filter(pl.col('store_time').is_null())
    assert untimed['time'].null_count() == 0
    admissions = rows.filter(pl.col('table') == 'admissions')
    left = admissions.select('hadm_id', left='until')
    both = untimed.join(left, on='hadm_id')
    assert (both['time'] >= both['left']).all()


@settings(max_examples=10, deadline=None)
@given(SEEDS)
def test_all_other_rows_keep_their_time(seed):
    made = carried(store(random_rows(seed), 'strict'))
    rest = made.filter(~DATED, pl.col('store_time').is_not_null())
    assert rest['time'].equals(rest['store_time'].alias('time'))


@settings(max_examples=10, deadline=None)
@given(SEEDS)
def test_under_charttime_a_day_keeps_its_time(seed):
    made = carried(store(random_rows(seed), 'strict'), 'charttime').filter(DATED)
    assert made['time'].equals(made['store_time'].alias('time'))


# labels

def known_rows(samples, task, made):
    "MEDS rows that a task may use, of every label."
    allowed = ~pl.col('table').is_in(hidden_tables(task, 'strict'))
    return label_rows(samples, task).join(made, on='subject_id').filter(
        pl.col('time') <= pl.col('prediction_time'), allowed)


def check_task(task, samples, known):
    "No known row gives the answer away."
    who = ['subject_id', 'prediction_time', 'hadm_id']
    of_stay = known.join(samples, on=who, how='semi')
    if task.family == 'decision':  # no row of the trigger
        before = pl.col('prediction_time') - MICROSECOND
        trigger = samples.select('subject_id', before, event='trigger')
        who = ['subject_id', 'prediction_time', 'event']
        assert not len(known.join(trigger, on=who, how='semi'))
    elif 'Mortality' in task.name:
        assert 'MEDS_DEATH' not in known['code']
    elif task.name.startswith('LengthOfStay'):
        assert not of_stay['code'].str.starts_with('HOSPITAL_DISCHARGE').any()
    elif task.name == 'ED_Hospitalization':
        assert set(of_stay['table']) <= {'patients', *BEFORE_ADMISSION}


@settings(max_examples=6, deadline=None)
@given(SEEDS)
def test_no_answer_is_there_at_its_prediction_time(seed):
    rows = store(random_rows(seed), 'strict')
    made = convert(rows)
    index = index_rows(rows, 'strict')
    for (name,), samples in index.partition_by('task', as_dict=True).items():
        task = TASKS[name]
        check_task(task, samples, known_rows(samples, task, made))


def labelled(*labels):
    times = [at(3), at(2), at(2)]
    return pl.DataFrame(dict(subject_id=[2, 1, 1], prediction_time=times, label=labels))


def test_labels_of_a_risk():
    samples = labelled(['yes'], ['no'], ['no'])
    found = label_rows(samples, TASKS['Inpatient_Mortality'])
    assert found.rows() == [
        (1, at(2), False),
        (1, at(2), False),
        (2, at(3), True),
    ]


def test_labels_of_a_decision_are_a_row_an_answer_just_before_the_trigger():
    samples = labelled(['b', 'a'], ['c'], ['c'])
    found = label_rows(samples, TASKS['labevents'])
    assert found.rows() == [
        (1, at(2) - MICROSECOND, 'c'),
        (2, at(3) - MICROSECOND, 'a'),
        (2, at(3) - MICROSECOND, 'b'),
    ]


# the stage

@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "Twelve synthetic patients: run, profile, tables."
    home = tmp_path_factory.mktemp('meds')
    build_hospital(home/'tables', 12, 7, workers=1, progress=False)
    run, source = Run('small', home), open_source(home/'tables')
    p = profile('smoke', workers=1, shard_patients=4)
    build_trajectories(source, run, p)
    build_index(run, p)
    build_samples(run, p)
    assert build_meds(run, p, source)
    return run, p, source


@pytest.fixture(scope='module')
def run(small):
    return small[0]


@pytest.fixture(scope='module')
def root(run):
    "The data set of the twelve patients."
    return run.folder/'meds'


@pytest.fixture
def copy(root, tmp_path):
    "A copy of the data set that may be spoilt."
    shutil.copytree(root, tmp_path/'meds', copy_function=os.link)
    return tmp_path/'meds'


def test_the_stage_is_up_to_date_afterwards(small):
    assert not build_meds(*small)


def test_what_the_check_finds_is_what_was_counted(run, root):
    found, counts = check_meds(root), read_manifest(root)['counts']
    assert found['subjects'] == 12
    assert found['rows'] == counts['rows']
    described = pq.read_table(root/'metadata/codes.parquet')
    assert found['codes'] == counts['codes'] == len(described)


def test_every_row_of_the_store_is_counted(run, root):
    counts = read_manifest(root)['counts']
    stored = read_manifest(run.trajectories)['counts']['tables']
    assert counts['tables'] == {table: count['rows'] for table, count in stored.items()}
    assert counts['without_year_of_birth'] == 0


def test_data_files_have_the_columns_of_meds_and_ours(root):
    for file in (root/'data').rglob('*.parquet'):
        meds.DataSchema.validate(pq.read_table(file))
        assert pq.read_schema(file).equals(DATA)


def test_every_subject_has_its_split(small, root):
    splits = pl.read_parquet(root/'metadata/subject_splits.parquet')
    assert len(splits) == 12
    expected = split_of(splits['subject_id'].to_numpy(), small[1].seed)
    assert splits['split'].to_list() == expected.tolist()


def test_the_version_of_meds_is_named(root):
    about = json.loads((root/'metadata/dataset.json').read_text())
    assert about['meds_version'] == meds.__version__


@pytest.fixture(scope='module')
def samples(run):
    both = pl.concat([scan_samples(run, name) for name in SETS])
    return both.drop('messages', 'candidates').collect()


def test_labels_are_those_of_the_samples(root, samples):
    for (task, split), some in samples.partition_by('task', 'split', as_dict=True).items():
        labels = pl.read_parquet(root/'tasks'/task/f'{split}.parquet')
        expected = label_rows(some, TASKS[task])
        assert labels.sort(pl.all()).equals(expected.sort(pl.all()))


def test_tasks_with_samples_have_labels_and_all_are_described(root, samples):
    labelled_tasks = {folder.name for folder in (root/'tasks').iterdir()}
    assert labelled_tasks == set(samples['task'])
    described = json.loads((root/'metadata/tasks.json').read_text())
    assert set(described) == set(TASKS)


@pytest.fixture(scope='module')
def codes(root):
    return pl.read_parquet(root/'metadata/codes.parquet')


def test_parents_of_a_laboratory_code_are_the_items_of_its_name(codes, small):
    laboratory = codes.filter(pl.col('code').str.starts_with('LAB//RESULT//'))
    lab = laboratory.row(0, named=True)
    name = lab['code'].split('//')[2]
    dictionary = small[2].scan('d_labitems', ['itemid', 'label'])
    items = dictionary.filter(pl.col('label') == name).collect()
    assert len(items) > 0
    assert lab['parent_codes'] == sorted(f'MIMIC-IV_ITEM/{item}' for item in items['itemid'])
    assert name in lab['description']


def test_parents_of_a_diagnosis_are_icd_codes_with_a_dot(codes):
    diagnoses = codes.filter(pl.col('code').str.starts_with('DIAGNOSIS//ICD//'))
    parents = diagnoses['parent_codes']
    assert parents.list.len().min() > 0
    assert parents.explode().str.contains(r'^ICD(9|10)CM/[A-Z0-9]+(\.[A-Z0-9]+)?$').all()


def content(folder):
    "Digests of what a stage wrote."
    digests = {}
    for file in folder.rglob('*'):
        if file.is_file() and file.name != 'measured.json':
            digests[file.relative_to(folder)] = hashlib.sha256(file.read_bytes()).hexdigest()
    return digests


def test_the_same_bytes_again_also_after_a_crash(small, root, tmp_path, monkeypatch):
    run, p, source = small
    other = Run('other', tmp_path)
    for stage in ('trajectories', 'samples'):
        shutil.copytree(getattr(run, stage), getattr(other, stage))
    real, calls = module.write_data, []

    def killed(*args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(module, 'write_data', killed)
    with pytest.raises(KeyboardInterrupt):
        build_meds(other, p, source)
    assert not (other.folder/'meds').exists()
    monkeypatch.setattr(module, 'write_data', real)
    build_meds(other, p, source)
    assert content(other.folder/'meds') == content(root)


# back to a store

@pytest.fixture(scope='module')
def back(root, tmp_path_factory):
    "The run whose store was restored."
    run = Run('back', tmp_path_factory.mktemp('back'))
    assert restore_store(root, run)
    return run


def same_rows(first, second):
    "Do two stores hold the same rows in the same files?"
    files = zip(store_files(first.trajectories), store_files(second.trajectories), strict=True)
    for file, other in files:
        if not pl.read_parquet(file).equals(pl.read_parquet(other)):
            return False
    return True


def test_the_store_comes_back(run, back):
    assert same_rows(run, back)
    assert read_manifest(run.trajectories)['counts'] == read_manifest(back.trajectories)['counts']


def test_a_restored_store_is_up_to_date(root, back):
    assert not restore_store(root, back)


def test_a_restored_store_gives_the_same_index(small, back):
    build_index(back, small[1])
    first = pl.read_parquet(small[0].index/'shard-*.parquet')
    second = pl.read_parquet(back.index/'shard-*.parquet')
    assert first.equals(second)


def test_a_missing_file_of_a_shard_is_noticed(copy, tmp_path):
    next((copy/'data').rglob('*.parquet')).unlink()
    with pytest.raises(TableError, match='rows of .* are missing or doubled'):
        restore_store(copy, Run('back', tmp_path))
    assert not Run('back', tmp_path).trajectories.exists()


# bad files

def replaced(table, column, values):
    return table.set_column(table.schema.get_field_index(column), column, values)


def as_type(column, kind):
    return lambda table: replaced(table, column, table[column].cast(kind))


def without_first(table):
    return table.slice(1)


def backwards(table):
    return table.sort_by([('subject_id', 'ascending'), ('time', 'descending')])


def in_two_places(table):
    "The rows of a subject stand in two places."
    ids = table['subject_id'].to_numpy()
    first = int(np.flatnonzero(ids != ids[0])[0])
    above, below = table.slice(0, first - 1), table.slice(first - 1)
    return pa.concat_tables([below, above])


def without_code(table):
    codes = [None, *table['code'].to_pylist()[1:]]
    return replaced(table, 'code', pa.array(codes, pa.string()))


def of_subject_1(table):
    return replaced(table, 'subject_id', pa.array([1]*len(table)))


def last_of_subject_1(table):
    return of_subject_1(table).sort_by('time').slice(len(table) - 1)


def first_twice(table):
    return pa.concat_tables([table, table.slice(0, 1)])


def swapped_splits(table):
    other = dict(train='tuning', tuning='train')
    splits = [other.get(split, split) for split in table['split'].to_pylist()]
    return replaced(table, 'split', pa.array(splits))


def without_times(table):
    return replaced(table, 'prediction_time', pa.nulls(len(table), pa.timestamp('us')))


def with_sample_id(table):
    return table.append_column('sample_id', pa.array(['x']*len(table)))


CODES, SPLITS = 'metadata/codes.parquet', 'metadata/subject_splits.parquet'
FAULTS = [
    ('data', lambda table: table.drop_columns('time'), 'Missing required columns: time'),
    ('data', as_type('subject_id', pa.int32()), 'subject_id'),
    ('data', as_type('numeric_value', pa.float64()), 'numeric_value'),
    ('data', as_type('time', pa.timestamp('ms')), 'time'),
    ('data', backwards, r'column subject_id, row \d+: subject \d+ goes back in time'),
    ('data', in_two_places, 'column subject_id, row .*rows elsewhere'),
    ('data', without_code, 'code'),
    ('data', last_of_subject_1, 'subject 1 has no split'),
    (CODES, without_first, 'is not in metadata/codes.parquet'),
    (CODES, lambda table: table.rename_columns(['name', 'description', 'parent_codes']), 'code'),
    (SPLITS, lambda table: table.slice(0, 0), 'has no split'),
    (SPLITS, first_twice, 'stands there twice'),
    (SPLITS, swapped_splits, 'is not of the split'),
    ('tasks', with_sample_id, 'sample_id'),
    ('tasks', of_subject_1, 'subject 1 has no data'),
    ('tasks', without_times, 'prediction_time'),
]


def file_to_spoil(root, where):
    "The file that is named, or the largest below a folder, but not one of a risk."
    if where.startswith('metadata'):
        return root/where
    files = (root/where).rglob('*.parquet')

    def preference(file):
        risk = pq.read_schema(file).names[-1] == 'boolean_value'
        return not risk, file.stat().st_size

    return max(files, key=preference)


@pytest.mark.parametrize('where, change, words', FAULTS)
def test_a_bad_file_is_named(copy, where, change, words):
    file = file_to_spoil(copy, where)
    table = pq.read_table(file)
    file.unlink()
    pq.write_table(change(table), file)
    with pytest.raises(TableError, match=words) as error:
        check_meds(copy)
    assert '/' in str(error.value)
    assert '.parquet' in str(error.value)


def test_a_subject_in_two_files(copy):
    file = next((copy/'data').rglob('*.parquet'))
    shutil.copy(file, file.with_name('99999.parquet'))
    with pytest.raises(TableError, match='rows elsewhere'):
        check_meds(copy)


def test_a_data_file_that_is_no_parquet(copy):
    file = next((copy/'data').rglob('*.parquet'))
    file.with_name('99999.parquet').write_bytes(b'no parquet')
    with pytest.raises(TableError, match='99999.parquet: Parquet'):
        check_meds(copy)


def test_a_description_that_is_no_json(copy):
    (copy/'metadata/dataset.json').unlink()
    (copy/'metadata/dataset.json').write_text('{')
    with pytest.raises(TableError, match='dataset.json'):
        check_meds(copy)


def test_a_data_set_without_codes(copy):
    (copy/'metadata/codes.parquet').unlink()
    with pytest.raises(TableError, match='codes.parquet: .*No such file'):
        check_meds(copy)


def test_a_folder_without_data(tmp_path):
    with pytest.raises(TableError, match='no Parquet file below data'):
        check_meds(tmp_path)


# a data set of others

@pytest.fixture
def foreign(tmp_path):
    "What another program could have written."
    root = tmp_path/'other'
    (root/'data'/'deep').mkdir(parents=True)
    (root/'metadata').mkdir()
    codes = ['SEX//male', 'MEDS_BIRTH', 'LOINC//2160-0', 'VISIT', 'SEX//female']
    times = [None, at(1), at(2), at(1), None]
    rows = dict(
        code=codes,
        time=pa.array(times, pa.timestamp('us')),
        subject_id=[3, 3, 3, 9, 7],
        unit=['mg']*5)
    splits = dict(
        subject_id=[3, 7, 9],
        split=['train', 'train', 'mine'])
    pq.write_table(pa.table(rows), root/'data'/'deep'/'0.parquet')
    pq.write_table(pa.table(dict(code=codes)), root/CODES)
    pq.write_table(pa.table(splits), root/SPLITS)
    about = dict(dataset_name='elsewhere', created_at='2025-01-01T00:00:00')
    (root/'metadata'/'dataset.json').write_text(json.dumps(about))
    return root


def test_a_data_set_of_others_can_be_checked(foreign):
    found = check_meds(foreign)
    assert found == dict(files=1, rows=5, subjects=3, codes=5, labels={})


def test_a_data_set_of_others_is_not_restored(foreign, tmp_path):
    with pytest.raises(TableError, match='0.parquet, column .*Only what `build_meds` wrote'):
        restore_store(foreign, Run('back', tmp_path))
    assert not Run('back', tmp_path).folder.exists()


# the demo

LARGE = ('chartevents', 'poe', 'prescriptions', 'pharmacy', 'ingredientevents', 'inputevents', 'datetimeevents')
ROWS = dict(
    admissions=275,
    icustays=140,
    labevents=107_727,
    emar=35_835,
    edstays=222,
    vitalsign=1_038,
    medrecon=2_764)


def test_the_demo_comes_back_with_the_rows_of_its_source(demo, tmp_path):
    whole = open_source(demo)  # the notebook does it with all tables
    small_files = {table: file for table, file in whole.files.items() if table not in LARGE}
    source = replace(whole, files=small_files)
    run, back = Run('demo', tmp_path), Run('back', tmp_path)
    p = profile('smoke', workers=1)
    build_trajectories(source, run, p)
    build_meds(run, p, source)
    restore_store(run.folder/'meds', back)
    folders = run.trajectories, run.folder/'meds', back.trajectories
    stored, made, restored = (read_manifest(folder)['counts'] for folder in folders)

    assert {table: made['tables'][table] for table in ROWS} == ROWS
    assert made['labels'] == {}
    assert set(stored['tables']) == {table for table in DISPLAY if source.has(table)}
    for table, count in stored['tables'].items():
        assert source.rows(table) == count['rows']
        assert made['tables'][table] == count['rows']
        assert restored['tables'][table]['rows'] == count['rows']
    assert same_rows(run, back)
