"MEDS: valid by the package's own schemas, nothing lost on the way back, nothing known too early, bad files named."
import hashlib, json, os, shutil
from dataclasses import replace
from datetime import datetime, timedelta
import numpy as np, polars as pl, pyarrow as pa, pyarrow.parquet as pq, pytest
import meds
from hypothesis import given, settings, strategies as st
from records import at, merged, random_rows, row, store
import ehr_r1.data.meds as module
from ehr_r1.config import Run
from ehr_r1.profiles import profile
from ehr_r1.stages import read_manifest
from ehr_r1.hospital.hospital import build_hospital
from ehr_r1.data.meds import DATA, build_meds, check_meds, hidden_tables, label_rows, meds_rows, restore_rows, restore_store
from ehr_r1.data.samples import SETS, build_samples, scan_samples, split_of
from ehr_r1.data.table_files import TableError
from ehr_r1.data.tables import open_source
from ehr_r1.data.tasks import BEFORE_ADMISSION, DATE_ONLY, TASKS, build_index, index_rows
from ehr_r1.data.events import DISPLAY, FIELD
from ehr_r1.data.trajectories import build_trajectories, store_files

def born(rows): return rows.select('subject_id', born=pl.lit(datetime(2080, 1, 1))).unique()
def convert(rows, times='available'): return meds_rows(rows, born(rows), times)

# rows there and back

@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(['strict', 'official']), st.sampled_from(['available', 'charttime']))
def test_rows_come_back_exactly(seed, protocol, times):
    rows = store(random_rows(seed), protocol)
    made = convert(rows, times)
    assert restore_rows(made).equals(rows)
    assert restore_rows(made.sample(fraction=1, shuffle=True, seed=seed % 999)).equals(rows)
    assert made['subject_id'].is_sorted() and made['row'].count() == len(rows)
    order = made.select(same=pl.col('subject_id') == pl.col('subject_id').shift(1), ok=pl.col('time').is_null() & pl.col('time').shift(1).is_null()
                        | pl.col('time').shift(1).is_null() | (pl.col('time') >= pl.col('time').shift(1)))
    assert order.filter('same')['ok'].all()

@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(DISPLAY)), st.lists(st.text(max_size=30), max_size=9))
def test_whatever_a_cell_holds_comes_back(table, cells):
    rows = store([row('patients'), row(table, at(1), 7) | dict(cells=FIELD.join(cells))] if table != 'patients' else [row(table) | dict(cells=FIELD.join(cells))], 'strict')
    made = convert(rows)
    assert restore_rows(made).equals(rows) and made['code'].null_count() == 0 and made['numeric_value'].drop_nulls().is_finite().all()

def test_a_note_stands_in_the_file_once():
    made = convert(store([row('patients'), row('discharge', at(2), 7, ['DS', f'He left.{FIELD}And came back.'])], 'strict')).filter(pl.col('table') == 'discharge')
    assert made['text_value'].to_list() == [f'He left.{FIELD}And came back.'] and made['cells'].to_list() == ['DS' + FIELD]

def test_lost_and_doubled_rows_are_noticed():
    made = convert(store(random_rows(3), 'strict'))
    inner = made.with_row_index('i').filter(pl.col('row') == 2)['i'][0]
    for spoilt in (made.filter(pl.int_range(pl.len()) != inner), pl.concat([made, made[inner]])):
        with pytest.raises(TableError, match='x.parquet, column row: subject 1 has lost or doubled rows'): restore_rows(spoilt, 'x.parquet')

# what a row says and when

def codes_of(rows, *columns): return convert(store([row('patients', cells=['60.0', 'F']), *rows], 'strict')).filter(pl.col('table') != 'patients').select('code', *columns).rows()

def test_codes_and_values():
    lab = dict(item_name='Creatinine', valuenum='1.3', valueuom='mg/dL', comments='hemolysed')
    assert codes_of([row('labevents', at(1), 7, lab)], 'numeric_value', 'text_value') == [('LAB//RESULT//Creatinine//mg/dL', pytest.approx(1.3), 'hemolysed')]
    assert codes_of([row('labevents', at(1), 7, dict(item_name='Culture', comments='no growth'))], 'numeric_value', 'text_value') == [('LAB//RESULT//Culture//UNK', None, 'no growth')]
    assert codes_of([row('omr', at(1), None, ['BMI (kg/m2)', '24.5'])], 'numeric_value', 'text_value') == [('BMI (kg/m2)', 24.5, None)]
    assert codes_of([row('omr', at(1), None, ['Blood Pressure', '120/80'])], 'numeric_value', 'text_value') == [('Blood Pressure', None, '120/80')]
    assert codes_of([row('radiology', at(1), 7, ['RR', 'CHEST (PA AND LAT)\x1eKNEE', 'Clear.'])]) == [('NOTE//RADIOLOGY//CHEST (PA AND LAT) + KNEE',)]
    for odd in ('nan', 'inf', '1e999', '-inf'): assert codes_of([row('outputevents', at(1), 7, ['Urine', odd, 'mL'])], 'numeric_value')[0][1] is None

def test_vital_signs_are_rows_of_their_own():
    got = codes_of([row('vitalsign', at(1), None, dict(temperature='98.6', pain='ua', rhythm='Sinus'), stay=3)], 'numeric_value', 'text_value', 'row')
    assert got == [('ED_VITALSIGN', None, 'Sinus', 1), ('VITALS//temperature', pytest.approx(98.6), None, None), ('VITALS//pain', None, 'ua', None)]

def test_stays_have_an_end_and_patients_a_birth_and_one_death():
    rows = [row('patients', cells=['60.0', 'F'], died=at(9)), row('admissions', at(1, 9), 7, ['URGENT', 'ED'], until=at(3)), row('icustays', at(2), 7, until=at(2, 12), stay=4)]
    made = convert(store(rows, 'strict'))
    assert made.select('code', 'time').rows() == [
        ('GENDER//F', None), ('MEDS_BIRTH', datetime(2080, 1, 1)), ('HOSPITAL_ADMISSION//URGENT//ED', at(1, 9)), ('ICU_ADMISSION//UNK', at(2)),
        ('ICU_DISCHARGE//UNK', at(2, 12)), ('HOSPITAL_DISCHARGE//UNK', at(3)), ('MEDS_DEATH', at(9, 23, 59) + timedelta(seconds=59))]
    rows[1]['died'] = at(3)
    assert convert(store(rows, 'strict')).filter(pl.col('code') == 'MEDS_DEATH')['time'].to_list() == [at(3)]
    unknown = meds_rows(store(rows, 'strict'), pl.DataFrame(schema=dict(subject_id=pl.Int64, born=pl.Datetime('us'))), 'available')
    assert 'MEDS_BIRTH' not in unknown['code'] and restore_rows(unknown).equals(store(rows, 'strict'))

@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_no_row_is_known_before_it_was(seed):
    rows = store(random_rows(seed), 'strict')
    made = convert(rows).filter(pl.col('row').is_not_null())
    dated, untimed = made.filter(pl.col('table').is_in(DATE_ONLY)), made.filter(pl.col('store_time').is_null(), pl.col('table') != 'patients')
    assert (dated['time'] - dated['store_time'] == timedelta(days=1)).all()
    left = rows.filter(pl.col('table') == 'admissions').select('hadm_id', left='until')
    assert untimed.join(left, on='hadm_id').select((pl.col('time') >= pl.col('left')).all()).item() and untimed['time'].null_count() == 0
    rest = made.filter(~pl.col('table').is_in(DATE_ONLY), pl.col('store_time').is_not_null())
    assert rest['time'].equals(rest['store_time'].alias('time'))
    plain = convert(rows, 'charttime').filter(pl.col('table').is_in(DATE_ONLY), pl.col('row').is_not_null())
    assert plain['time'].equals(plain['store_time'].alias('time'))

# labels

@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10**6))
def test_no_answer_is_there_at_its_prediction_time(seed):
    rows = store(random_rows(seed), 'strict')
    index, made = index_rows(rows, 'strict'), convert(rows)
    for (name,), some in index.partition_by('task', as_dict=True).items():
        task = TASKS[name]; labels = label_rows(some, task)
        known = labels.join(made, on='subject_id').filter(pl.col('time') <= pl.col('prediction_time'), ~pl.col('table').is_in(hidden_tables(task, 'strict')))
        if task.family == 'decision': # no row of the trigger
            trigger = some.select('subject_id', 'prediction_time', event='trigger').with_columns(pl.col('prediction_time') - timedelta(microseconds=1))
            assert not len(known.join(trigger, on=['subject_id', 'prediction_time', 'event'], how='semi'))
        elif 'Mortality' in name: assert 'MEDS_DEATH' not in known['code']
        elif name.startswith('LengthOfStay'): # this stay's discharge
            this = known.join(some.select('subject_id', 'prediction_time', 'hadm_id'), on=['subject_id', 'prediction_time', 'hadm_id'], how='semi')
            assert not this['code'].str.starts_with('HOSPITAL_DISCHARGE').any()
        elif name == 'ED_Hospitalization': # nothing of the hospital stay
            this = known.join(some.select('subject_id', 'prediction_time', 'hadm_id'), on=['subject_id', 'prediction_time', 'hadm_id'], how='semi')
            assert set(this['table']) <= {'patients', *BEFORE_ADMISSION}

def test_labels_say_what_the_samples_say():
    some = pl.DataFrame(dict(subject_id=[2, 1, 1], prediction_time=[at(3), at(2), at(2)], label=[['yes'], ['no'], ['no']]))
    risk = label_rows(some, TASKS['Inpatient_Mortality'])
    assert risk.rows() == [(1, at(2), False), (1, at(2), False), (2, at(3), True)]
    many = label_rows(some.with_columns(label=pl.Series([['b', 'a'], ['c'], ['c']])), TASKS['labevents'])
    before = timedelta(microseconds=1)
    assert many.rows() == [(1, at(2) - before, 'c'), (2, at(3) - before, 'a'), (2, at(3) - before, 'b')]

# the stage

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    home = tmp_path_factory.mktemp('meds')
    build_hospital(home/'tables', 12, 7, workers=1, progress=False)
    run, p, source = Run('small', home), profile('smoke', workers=1, shard_patients=4), open_source(home/'tables')
    build_trajectories(source, run, p); build_index(run, p); build_samples(run, p)
    assert build_meds(run, p, source) and not build_meds(run, p, source)
    return run, p, source

def content(folder): return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.rglob('*')) if f.is_file() and f.name != 'measured.json'}

def test_the_data_set_is_valid_and_whole(made):
    run, p, source = made; root = run.folder/'meds'
    found, counts, store_counts = check_meds(root), read_manifest(root)['counts'], read_manifest(run.trajectories)['counts']
    assert found['subjects'] == 12 and found['rows'] == counts['rows'] and found['codes'] == counts['codes'] == len(pq.read_table(root/'metadata/codes.parquet'))
    assert counts['tables'] == {t: c['rows'] for t, c in store_counts['tables'].items()} and counts['without_year_of_birth'] == 0
    for f in (root/'data').rglob('*.parquet'): meds.DataSchema.validate(pq.read_table(f)); assert pq.read_schema(f).equals(DATA)
    splits = pl.read_parquet(root/'metadata/subject_splits.parquet')
    assert splits['split'].to_list() == split_of(splits['subject_id'].to_numpy(), p.seed).tolist() and len(splits) == 12
    assert json.loads((root/'metadata/dataset.json').read_text())['meds_version'] == meds.__version__

def test_labels_are_the_samples(made):
    run, p, source = made; root = run.folder/'meds'
    samples = pl.concat([scan_samples(run, s).drop('messages', 'candidates').collect() for s in SETS])
    for (task, split), some in samples.partition_by('task', 'split', as_dict=True).items():
        labels = pl.read_parquet(root/'tasks'/task/f'{split}.parquet')
        assert labels.sort(pl.all()).equals(label_rows(some, TASKS[task]).sort(pl.all()))
    assert {f.name for f in (root/'tasks').iterdir()} == set(samples['task']) and set(json.loads((root/'metadata/tasks.json').read_text())) == set(TASKS)

def test_codes_have_parents_from_the_dictionaries(made):
    codes = pl.read_parquet(made[0].folder/'meds'/'metadata/codes.parquet')
    items = made[2].scan('d_labitems', ['itemid', 'label']).collect()
    lab = codes.filter(pl.col('code').str.starts_with('LAB//RESULT//')).row(0, named=True)
    name = lab['code'].split('//')[2]
    assert lab['parent_codes'] == sorted(f'MIMIC-IV_ITEM/{i}' for i in items.filter(pl.col('label') == name)['itemid']) and lab['parent_codes'] and name in lab['description']
    diagnosis = codes.filter(pl.col('code').str.starts_with('DIAGNOSIS//ICD//'))
    assert diagnosis['parent_codes'].list.len().min() > 0 and diagnosis['parent_codes'].explode().str.contains(r'^ICD(9|10)CM/[A-Z0-9]+(\.[A-Z0-9]+)?$').all()

def test_the_same_bytes_again_also_after_a_crash(made, tmp_path, monkeypatch):
    run, p, source = made; first = content(run.folder/'meds')
    other = Run('other', tmp_path)
    for s in ('trajectories', 'samples'): shutil.copytree(getattr(run, s), getattr(other, s))
    real, calls = module._write_shard, []
    def killed(*args):
        if len(calls) == 2: raise KeyboardInterrupt
        calls.append(args); return real(*args)
    monkeypatch.setattr(module, '_write_shard', killed)
    with pytest.raises(KeyboardInterrupt): build_meds(other, p, source)
    assert not (other.folder/'meds').exists()
    monkeypatch.setattr(module, '_write_shard', real)
    build_meds(other, p, source)
    assert content(other.folder/'meds') == first

def test_the_store_comes_back(made, tmp_path):
    run, p, source = made; back = Run('back', tmp_path)
    assert restore_store(run.folder/'meds', back) and not restore_store(run.folder/'meds', back)
    for a, b in zip(store_files(run.trajectories), store_files(back.trajectories), strict=True): assert pl.read_parquet(a).equals(pl.read_parquet(b))
    assert read_manifest(run.trajectories)['counts'] == read_manifest(back.trajectories)['counts']
    build_index(back, p)
    assert pl.read_parquet(run.index/'shard-*.parquet').equals(pl.read_parquet(back.index/'shard-*.parquet'))

def test_a_missing_file_of_a_shard_is_noticed(made, tmp_path):
    shutil.copytree(made[0].folder/'meds', tmp_path/'meds'); next((tmp_path/'meds'/'data').rglob('*.parquet')).unlink()
    with pytest.raises(TableError, match='rows of .* are missing or doubled'): restore_store(tmp_path/'meds', Run('back', tmp_path))
    assert not Run('back', tmp_path).trajectories.exists()

# bad files

def swap_subjects(t): # a subject's rows in two places
    ids = t['subject_id'].to_numpy(); n = int(np.flatnonzero(ids != ids[0])[0]); return pa.concat_tables([t.slice(n - 1), t.slice(0, n - 1)])
def null_code(t): return t.set_column(2, 'code', pa.array([None] + t['code'].to_pylist()[1:], pa.string()))
FAULTS = [
    ('data', lambda t: t.drop_columns('time'), 'Missing required columns: time'),
    ('data', lambda t: t.set_column(0, 'subject_id', t['subject_id'].cast(pa.int32())), 'subject_id'),
    ('data', lambda t: t.set_column(3, 'numeric_value', t['numeric_value'].cast(pa.float64())), 'numeric_value'),
    ('data', lambda t: t.set_column(1, 'time', t['time'].cast(pa.timestamp('ms'))), 'time'),
    ('data', lambda t: t.sort_by([('subject_id', 'ascending'), ('time', 'descending')]), r'column subject_id, row \d+: subject \d+ goes back in time'),
    ('data', swap_subjects, 'column subject_id, row .*rows elsewhere'),
    ('data', null_code, 'code'),
    ('data', lambda t: t.set_column(0, 'subject_id', pa.array([1]*len(t))).sort_by('time').slice(len(t) - 1), 'subject 1 has no split'),
    ('metadata/codes.parquet', lambda t: t.slice(1), "is not in metadata/codes.parquet"),
    ('metadata/codes.parquet', lambda t: t.rename_columns(['name', 'description', 'parent_codes']), 'code'),
    ('metadata/subject_splits.parquet', lambda t: t.slice(0, 0), 'has no split'),
    ('metadata/subject_splits.parquet', lambda t: pa.concat_tables([t, t.slice(0, 1)]), 'stands there twice'),
    ('metadata/subject_splits.parquet', lambda t: t.set_column(1, 'split', pa.array(['train' if s == 'tuning' else 'tuning' if s == 'train' else s for s in t['split'].to_pylist()])), 'is not of the split'),
    ('tasks', lambda t: t.append_column('sample_id', pa.array(['x']*len(t))), 'sample_id'),
    ('tasks', lambda t: t.set_column(0, 'subject_id', pa.array([1]*len(t))), 'subject 1 has no data'),
    ('tasks', lambda t: t.set_column(1, 'prediction_time', pa.nulls(len(t), pa.timestamp('us'))), 'prediction_time'),
]
@pytest.mark.parametrize('where, change, said', FAULTS)
def test_bad_files_are_named(made, tmp_path, where, change, said):
    root = tmp_path/'meds'; shutil.copytree(made[0].folder/'meds', root, copy_function=os.link)
    file = root/where if where.startswith('metadata') else max((root/where).rglob('*.parquet'), key=lambda f: (pq.read_schema(f).names[-1] != 'boolean_value', f.stat().st_size))
    table = pq.read_table(file); file.unlink(); pq.write_table(change(table), file)
    with pytest.raises(TableError, match=said) as e: check_meds(root)
    assert '/' in str(e.value) and '.parquet' in str(e.value)

def test_a_subject_in_two_files_and_files_that_are_none(made, tmp_path):
    root = tmp_path/'meds'; shutil.copytree(made[0].folder/'meds', root, copy_function=os.link)
    file = next((root/'data').rglob('*.parquet')); shutil.copy(file, file.with_name('99999.parquet'))
    with pytest.raises(TableError, match='rows elsewhere'): check_meds(root)
    file.with_name('99999.parquet').unlink(); file.with_name('99999.parquet').write_bytes(b'no parquet')
    with pytest.raises(TableError, match='99999.parquet: Parquet'): check_meds(root)
    file.with_name('99999.parquet').unlink(); (root/'metadata/dataset.json').unlink(); (root/'metadata/dataset.json').write_text('{')
    with pytest.raises(TableError, match='dataset.json'): check_meds(root)
    (root/'metadata/codes.parquet').unlink()
    with pytest.raises(TableError, match='codes.parquet: .*No such file'): check_meds(root)
    with pytest.raises(TableError, match='no Parquet file below data'): check_meds(tmp_path)

def foreign(root): # what another program could have written
    (root/'data'/'deep').mkdir(parents=True); (root/'metadata').mkdir()
    codes = ['SEX//male', 'MEDS_BIRTH', 'LOINC//2160-0', 'VISIT', 'SEX//female']
    pq.write_table(pa.table(dict(code=codes, time=pa.array([None, at(1), at(2), at(1), None], pa.timestamp('us')), subject_id=[3, 3, 3, 9, 7], unit=['', '', 'mg', '', ''])), root/'data'/'deep'/'0.parquet')
    pq.write_table(pa.table(dict(code=codes)), root/'metadata'/'codes.parquet')
    pq.write_table(pa.table(dict(subject_id=[3, 7, 9], split=['train', 'train', 'mine'])), root/'metadata'/'subject_splits.parquet')
    (root/'metadata'/'dataset.json').write_text('{"dataset_name": "elsewhere", "created_at": "2025-01-01T00:00:00"}')

def test_a_data_set_of_others_is_checked_but_not_restored(tmp_path):
    foreign(tmp_path/'other')
    assert check_meds(tmp_path/'other') == dict(files=1, rows=5, subjects=3, codes=5, labels={})
    with pytest.raises(TableError, match='0.parquet, column .*Only what `build_meds` wrote'): restore_store(tmp_path/'other', Run('back', tmp_path))
    assert not Run('back', tmp_path).folder.exists()

# the demo

def test_the_demo_comes_back_with_the_rows_of_its_source(demo, tmp_path):
    whole, large = open_source(demo), ('chartevents', 'poe', 'prescriptions', 'pharmacy', 'ingredientevents', 'inputevents', 'datetimeevents')
    source = replace(whole, files={t: f for t, f in whole.files.items() if t not in large}) # the notebook does it with all tables
    run, back, p = Run('demo', tmp_path), Run('back', tmp_path), profile('smoke', workers=1)
    build_trajectories(source, run, p); build_meds(run, p, source)
    restore_store(run.folder/'meds', back)
    first, made, second = (read_manifest(f)['counts'] for f in (run.trajectories, run.folder/'meds', back.trajectories))
    expected = dict(admissions=275, icustays=140, labevents=107_727, emar=35_835, edstays=222, vitalsign=1_038, medrecon=2_764)
    assert {t: made['tables'][t] for t in expected} == expected and made['labels'] == {}
    for t in first['tables']: assert made['tables'][t] == first['tables'][t]['rows'] == second['tables'][t]['rows'] == source.rows(t)
    assert set(first['tables']) == {t for t in DISPLAY if source.has(t)}
    for a, b in zip(store_files(run.trajectories), store_files(back.trajectories), strict=True): assert pl.read_parquet(a).equals(pl.read_parquet(b))
