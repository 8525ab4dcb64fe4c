"The synthetic hospital: same bytes, whole files, ids that fit, notes that agree, risks that are true."
import hashlib, re
import numpy as np, polars as pl, pytest
from sklearn.metrics import roc_auc_score
from ehr_r1.hospital import hospital
from ehr_r1.hospital.conditions import matrix, read_library
from ehr_r1.hospital.illness import courses, patients, true_risks
from ehr_r1.hospital.visits import BLOCK
from ehr_r1.hospital.hospital import FORMATS, block_tables, build_hospital
from ehr_r1.data.schema import TABLES

PATIENTS = BLOCK + 20          # two blocks, the second cut short

@pytest.fixture(scope='module')
def built(tmp_path_factory): # folder of a small hospital
    folder = tmp_path_factory.mktemp('hospital')/'a'
    build_hospital(folder, PATIENTS, 7, workers=2, progress=False)
    return folder

@pytest.fixture(scope='module')
def read(built): # table to frame, everything as text
    frames = {}
    def load(name):
        if name not in frames: frames[name] = pl.read_csv(built/(TABLES[name].module if name in TABLES else 'codes')/f'{name}.csv.gz', infer_schema_length=0)
        return frames[name]
    return load

def digests(folder): return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.rglob('*')) if f.is_file()}

def test_same_bytes_whatever_the_workers(built, tmp_path):
    build_hospital(tmp_path/'b', PATIENTS, 7, workers=1, progress=False)
    assert digests(built) == digests(tmp_path/'b')

def test_another_seed_is_another_hospital():
    a, b = (block_tables(seed, 0, 5)[0]['labevents'] for seed in (1, 2))
    assert not a.equals(b)

def test_fewer_patients_are_the_first_of_more(built, read, tmp_path):
    build_hospital(tmp_path/'few', 30, 7, workers=1, progress=False)
    for name in TABLES:
        few = pl.read_csv(tmp_path/'few'/TABLES[name].module/f'{name}.csv.gz', infer_schema_length=0)
        more = read(name)
        if 'subject_id' in few.columns: more = more.filter(pl.col('subject_id').cast(pl.Int64) <= 10_000_030)
        assert few.equals(more), name
    few, more = (pl.read_parquet(x/'truth.parquet') for x in (tmp_path/'few', built))
    assert few.sort(few.columns).equals(more.filter(pl.col('subject_id') <= 10_000_030).sort(few.columns))

@pytest.mark.parametrize('fmt', FORMATS)
def test_every_table_and_column_in_every_format(fmt, tmp_path):
    counts = build_hospital(tmp_path/'h', 3, 1, fmt=fmt, workers=1, progress=False)
    load = pl.read_parquet if fmt == 'parquet' else lambda f: pl.read_csv(f, infer_schema_length=0)
    for name, table in TABLES.items():
        frame = load(tmp_path/'h'/table.module/f'{name}.{fmt}')
        assert frame.columns == list(table.columns), name
        assert len(frame) == counts[name], name
    assert 'CC0' in (tmp_path/'h'/'LICENSE.txt').read_text()

def test_no_table_is_empty(read):
    assert not [name for name in TABLES if not len(read(name))]

def test_ids_fit_together(read):
    def inside(child, parent, keys):
        c = read(child).select(keys).drop_nulls().unique()
        assert len(c) and len(c.join(read(parent).select(keys).unique(), on=keys, how='anti')) == 0, (child, parent, keys)
    for name, table in TABLES.items():
        if name == 'patients' or 'subject_id' not in table.columns: continue
        inside(name, 'patients', ['subject_id'])
        if 'hadm_id' in table.columns and name != 'admissions': inside(name, 'admissions', ['subject_id', 'hadm_id'])
    for name in ('chartevents', 'inputevents', 'ingredientevents', 'outputevents', 'procedureevents', 'datetimeevents'):
        inside(name, 'icustays', ['subject_id', 'hadm_id', 'stay_id']); inside(name, 'd_items', ['itemid'])
    for name in ('triage', 'vitalsign', 'medrecon', 'pyxis', 'diagnosis'): inside(name, 'edstays', ['subject_id', 'stay_id'])
    inside('labevents', 'd_labitems', ['itemid'])
    for name in ('pharmacy', 'prescriptions', 'emar', 'poe_detail'): inside(name, 'poe', ['poe_id'])
    for name in ('prescriptions', 'emar'): inside(name, 'pharmacy', ['pharmacy_id', 'poe_id'])
    inside('emar_detail', 'emar', ['emar_id', 'emar_seq']); inside('radiology_detail', 'radiology', ['note_id']); inside('discharge_detail', 'discharge', ['note_id'])
    inside('diagnoses_icd', 'd_icd_diagnoses', ['icd_code', 'icd_version']); inside('diagnosis', 'd_ccs_diagnoses', ['icd_code', 'icd_version'])
    inside('procedures_icd', 'd_icd_procedures', ['icd_code', 'icd_version']); inside('procedures_icd', 'd_ccs_procedures', ['icd_code', 'icd_version'])
    drugs = set(read('d_atc_prescriptions')['ndc_code'])
    assert set(read('prescriptions')['ndc']) <= drugs and set(read('medrecon')['ndc']) <= drugs and {len(x) for x in drugs} == {11}
    assert set(read('icustays')['stay_id']) <= set(read('transfers')['transfer_id'])

def test_keys_are_unique(read):
    for name, table in TABLES.items():
        if table.key: assert read(name).select(table.key).is_unique().all(), name

def test_numbers_within_a_patient_run_on(read):
    for name, number in (('poe', 'poe_seq'), ('emar', 'emar_seq')):
        x = read(name).with_columns(pl.col(number).cast(pl.Int64))
        each = x.group_by('subject_id').agg(pl.col(number).min().alias('low'), pl.col(number).max().alias('high'), pl.len())
        assert (each['low'] == 1).all() and (each['high'] == each['len']).all()

def times(frame, *columns): return frame.with_columns(pl.col(c).str.to_datetime('%Y-%m-%d %H:%M:%S') for c in columns)

def test_results_come_after_their_specimens(read):
    for name, taken in (('labevents', 'charttime'), ('microbiologyevents', 'charttime'), ('radiology', 'charttime'), ('discharge', 'charttime'), ('chartevents', 'charttime'), ('emar', 'charttime'),
                        ('outputevents', 'charttime'), ('datetimeevents', 'charttime'), ('inputevents', 'starttime'), ('procedureevents', 'starttime')):
        x = times(read(name).filter(pl.col(taken).is_not_null()), taken, 'storetime')
        assert (x['storetime'] >= x[taken]).all(), name

def test_stays_are_ordered(read):
    a = times(read('admissions'), 'admittime', 'dischtime', 'edregtime', 'edouttime', 'deathtime')
    assert (a['admittime'] < a['dischtime']).all()
    ed = a.filter(pl.col('edregtime').is_not_null())
    assert (ed['edregtime'] < ed['admittime']).all() and (ed['admittime'] <= ed['edouttime']).all()
    died = a.filter(pl.col('hospital_expire_flag') == '1')
    assert (died['deathtime'] == died['dischtime']).all() and (died['discharge_location'] == 'DIED').all()
    dod = died.join(read('patients'), on='subject_id')
    assert (dod['dod'] == dod['deathtime'].dt.to_string('%Y-%m-%d')).all()
    visits = a.sort('subject_id', 'admittime').with_columns(pl.col('dischtime').shift().over('subject_id').alias('before'))
    assert (visits['admittime'] > visits['before']).drop_nulls().all()
    icu = times(read('icustays'), 'intime', 'outtime').join(a, on='hadm_id')
    assert (icu['intime'] < icu['outtime']).all() and (icu['intime'] >= icu['admittime']).all() and (icu['outtime'] <= icu['dischtime']).all()

def test_transfers_leave_no_gap(read):
    t = times(read('transfers').filter(pl.col('hadm_id').is_not_null()), 'intime', 'outtime').sort('hadm_id', 'intime', 'transfer_id')
    following = t.with_columns(pl.col('intime').shift(-1).over('hadm_id').alias('next')).filter(pl.col('next').is_not_null())
    assert (following['outtime'] == following['next']).all()
    assert (t.group_by('hadm_id').agg(pl.col('eventtype').last())['eventtype'] == 'discharge').all()

def test_nothing_is_charted_after_death(read):
    dead = times(read('admissions').filter(pl.col('deathtime').is_not_null()), 'deathtime').select('subject_id', 'deathtime')
    for name, column in (('labevents', 'charttime'), ('emar', 'charttime'), ('chartevents', 'charttime'), ('poe', 'ordertime'), ('edstays', 'intime'), ('vitalsign', 'charttime')):
        x = times(read(name), column).join(dead, on='subject_id')
        assert (x[column] <= x['deathtime']).all(), name

def section(text, title, following): return re.search(rf'{title}:\n(.*?)\n\n{following}', text, re.S).group(1).split('\n')

def test_summaries_agree_with_the_tables(read):
    titles = read('d_icd_diagnoses').rename({'long_title': 'title'}); done = read('d_icd_procedures').rename({'long_title': 'title'})
    of = lambda frame: {k[0]: x for k, x in frame.group_by(['hadm_id'])}
    diagnoses = of(read('diagnoses_icd').join(titles, on=['icd_code', 'icd_version'])); procedures = of(read('procedures_icd').join(done, on=['icd_code', 'icd_version']))
    labs = of(read('labevents').filter(pl.col('hadm_id').is_not_null()).join(read('d_labitems'), on='itemid')); drugs = of(read('prescriptions')); films = of(read('radiology').filter(pl.col('hadm_id').is_not_null()))
    seen = dict(lab=0, drug=0, film=0)
    for note in read('discharge').iter_rows(named=True):
        text, hadm = note['text'], note['hadm_id']
        assert sorted(section(text, 'Discharge Diagnosis', 'Discharge Condition')) == sorted(diagnoses[hadm]['title'].to_list())
        written = section(text, 'Major Surgical or Invasive Procedure', 'History of Present Illness')
        assert sorted(written) == sorted(procedures[hadm]['title'].to_list() if hadm in procedures else ['None'])
        known = {(x['label'], float(x['valuenum'])) for x in labs[hadm].iter_rows(named=True)} if hadm in labs else set()
        for line in section(text, 'Pertinent Results', 'MICROBIOLOGY'):
            for label, value in re.findall(r'(\S[^*]*?)-(-?\d+(?:\.\d+)?)\*?(?: |$)', line): assert (label, float(value)) in known, (hadm, label, value); seen['lab'] += 1
        names = drugs[hadm]['drug'].to_list() if hadm in drugs else []
        for line in section(text, 'Discharge Medications', 'Discharge Disposition'):
            if line != 'None': assert any(line.split('. ', 1)[1].startswith(x) for x in names), (hadm, line); seen['drug'] += 1
        reports = films[hadm]['text'].to_list() if hadm in films else []
        for line in section(text, 'IMAGING', 'Brief Hospital Course'):
            if line != 'None': exam, impression = line.split(': ', 1); assert any(exam in x and impression in x for x in reports); seen['film'] += 1
        assert ('died in hospital' in text) == (read('admissions').filter(pl.col('hadm_id') == hadm)['hospital_expire_flag'][0] == '1')
    assert min(seen.values()) > 100

def test_what_was_known_on_arrival_tells_nothing_of_the_outcome(read):
    for note in read('discharge')['text']:
        before = note.split('Physical Exam:')[0]
        assert 'died' not in before and 'intensive' not in before.lower() and 'LABS' not in before

def test_reports_name_their_exam(read):
    x = read('radiology').join(read('radiology_detail').filter(pl.col('field_name') == 'exam_name'), on='note_id')
    assert len(x) == len(read('radiology')) and x.select(pl.col('text').str.contains(pl.col('field_value'), literal=True))['text'].all()

def test_truth_has_one_row_for_every_question(built, read):
    t = pl.read_parquet(built/'truth.parquet')
    assert t['risk'].is_between(0, 1).all() and t['risk'].null_count() == 0
    count = dict(t.group_by('task').len().iter_rows())
    tasks = {'ED': 5, 'Re': 2, 'Le': 2, 'In': 1, 'IC': 8}
    rows = {'ED': len(read('edstays')), 'Re': len(read('admissions')), 'Le': len(read('admissions')), 'In': len(read('admissions')), 'IC': len(read('icustays'))}
    for kind, many in tasks.items():
        mine = [task for task in count if task.startswith(kind)]
        assert len(mine) == many and {count[task] for task in mine} == {rows[kind]}, kind
    assert t.filter(pl.col('task').str.starts_with('ICU'))['stay_id'].cast(pl.String).is_in(read('icustays')['stay_id'].implode()).all()

def test_labels_are_what_the_tables_say(built, read):
    t = pl.read_parquet(built/'truth.parquet').with_columns(pl.col('hadm_id', 'stay_id').cast(pl.String))
    yes = lambda task, key: dict(t.filter(pl.col('task') == task).select(key, 'label').iter_rows())
    a = times(read('admissions'), 'admittime', 'dischtime'); e = times(read('edstays'), 'intime', 'outtime'); i = times(read('icustays'), 'intime', 'outtime')
    days = lambda frame, z, y: (frame[z] - frame[y]).dt.total_seconds()/86400
    for task, limit in (('LengthOfStay_3day', 3), ('LengthOfStay_7day', 7)): assert yes(task, 'hadm_id') == dict(zip(a['hadm_id'], days(a, 'dischtime', 'admittime') > limit))
    assert yes('ED_Hospitalization', 'stay_id') == dict(zip(e['stay_id'], e['hadm_id'].is_not_null()))
    first = i.sort('intime').group_by('hadm_id', maintain_order=True).agg(pl.col('intime').first().alias('icu'))
    soon = e.join(first, on='hadm_id', how='left')
    assert yes('ED_ICU_Tranfer_12hour', 'stay_id') == dict(zip(soon['stay_id'], (days(soon, 'icu', 'outtime') < .5).fill_null(False)))
    back = e.sort('subject_id', 'intime').with_columns(pl.col('intime').shift(-1).over('subject_id').alias('next'))
    assert yes('ED_Reattendance_3day', 'stay_id') == dict(zip(back['stay_id'], (days(back, 'next', 'outtime') < 3).fill_null(False)))
    again = a.sort('subject_id', 'admittime').with_columns(pl.col('admittime').shift(-1).over('subject_id').alias('next'), pl.col('dischtime').dt.truncate('1d').alias('note'))
    assert yes('Readmission_30day', 'hadm_id') == dict(zip(again['hadm_id'], (days(again, 'next', 'note') < 30).fill_null(False)))
    dod = dict(zip(read('patients')['subject_id'], read('patients')['dod'].str.to_datetime('%Y-%m-%d')))
    dead = lambda n: {s: bool(dod[p] is not None and (dod[p] - t0).total_seconds()/86400 < n + 1) for s, p, t0 in zip(i['stay_id'], i['subject_id'], i['intime'])}
    for n in (1, 3, 14): assert yes(f'ICU_Mortality_{n}day', 'stay_id') == dead(n)
    for n in (7, 14): assert yes(f'ICU_Stay_{n}day', 'stay_id') == dict(zip(i['stay_id'], days(i, 'outtime', 'intime') >= n))
    later = i.sort('intime').with_columns((pl.col('intime').cum_count(reverse=True).over('hadm_id') > 1).alias('more'))
    assert yes('ICU_Readmission', 'stay_id') == dict(zip(later['stay_id'], later['more']))

@pytest.fixture(scope='module')
def questions(): # task to (risk, label) of 10,000 patients: courses only, nothing charted
    lib, out = read_library(), {}
    for i in range(10):
        rng = np.random.Generator(np.random.Philox(key=1000 + i))
        p = patients(lib, rng, 1000); v = courses(lib, p, rng)
        for task, _, _, risk, label in true_risks(lib, p, v): out.setdefault(task, []).append(np.c_[risk, label])
    return {task: np.concatenate(x) for task, x in out.items()}

def test_risks_are_calibrated(questions):
    assert len(questions) == 18
    for task, x in questions.items():
        risk, label = x.T
        assert abs((label - risk).sum())/np.sqrt((risk*(1 - risk)).sum()) < 4, task
        for part in np.array_split(x[np.argsort(risk)], 5):
            error = np.sqrt((part[:, 0]*(1 - part[:, 0])).sum()) + 1.5
            assert abs((part[:, 1] - part[:, 0]).sum()) < 4*error, task

def test_risks_tell_patients_apart_but_not_perfectly(questions):
    for task, (risk, label) in ((task, x.T) for task, x in questions.items()):
        still = (risk > 0) & (risk < 1)
        assert roc_auc_score(label, risk) > .7, task
        assert .68 < roc_auc_score(label[still], risk[still]) < .96, task

def test_base_rates_are_near_mimic(questions):
    mimic = dict(ED_Hospitalization=.476, ED_ICU_Tranfer_12hour=.0626, Readmission_30day=.224, Inpatient_Mortality=.0223, LengthOfStay_3day=.597, LengthOfStay_7day=.228, ICU_Mortality_7day=.0875, ICU_Readmission=.0976)
    for task, rate in mimic.items(): assert .7*rate < questions[task][:, 1].mean() < 1.4*rate, task

def test_library_is_large_and_refuses_unknown_names():
    lib = read_library()
    assert len(lib.conditions) >= 30 and len(lib.chronic) >= 15
    with pytest.raises(ValueError, match='conditions.toml, x, drugs.*nosuch'): matrix({'x': {'drugs': {'nosuch': .5}}}, 'drugs', ['aspirin'])

def test_an_interrupted_hospital_is_none(tmp_path, monkeypatch):
    def broken(*args): raise KeyboardInterrupt
    monkeypatch.setattr(hospital, 'csv_bytes', broken)
    with pytest.raises(KeyboardInterrupt): build_hospital(tmp_path/'h', 3, 1, workers=1, progress=False)
    assert list(tmp_path.iterdir()) == []

def test_other_files_are_not_replaced(tmp_path):
    (tmp_path/'mine').mkdir(); (tmp_path/'mine'/'thesis.txt').write_text('years of work')
    with pytest.raises(FileExistsError): build_hospital(tmp_path/'mine', 3, 1, progress=False)
    assert (tmp_path/'mine'/'thesis.txt').exists()

@pytest.mark.parametrize('wrong', [dict(patients=0), dict(workers=0), dict(fmt='xlsx')])
def test_wrong_arguments_are_refused(wrong, tmp_path):
    with pytest.raises(ValueError): build_hospital(tmp_path/'h', **(dict(patients=3, seed=1, progress=False) | wrong))
