"The synthetic hospital: same bytes, whole files, ids that fit, notes that agree, risks that are true."
import hashlib
import re

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

from ehr_r1.data.schema import TABLES
from ehr_r1.hospital import hospital
from ehr_r1.hospital.block import BLOCK_SIZE, new_block
from ehr_r1.hospital.conditions import matrix, read_library
from ehr_r1.hospital.draws import Draws
from ehr_r1.hospital.hospital import CHARTING, FORMATS, block_tables, build_hospital
from ehr_r1.hospital.illness import draw_visits
from ehr_r1.hospital.patients import patients
from ehr_r1.hospital.risks import true_risks
from ehr_r1.hospital.visits import chart_visits

PATIENTS = BLOCK_SIZE + 20 # two blocks, the second cut short
DAY = 86400 # seconds


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "Folder of a small hospital."
    folder = tmp_path_factory.mktemp('hospital')/'a'
    build_hospital(folder, PATIENTS, 7, workers=2, progress=False)
    return folder


def path_of(folder, name, fmt='csv.gz'):
    module = TABLES[name].module if name in TABLES else 'codes'
    return folder/module/f'{name}.{fmt}'


@pytest.fixture(scope='module')
def read(built):
    "A function from a table's name to its rows, everything as text."
    frames = {}

    def load(name):
        if name not in frames:
            frames[name] = pl.read_csv(path_of(built, name), infer_schema_length=0)
        return frames[name]

    return load


@pytest.fixture(scope='module')
def truth(built):
    return pl.read_parquet(built/'truth.parquet')


def with_times(frame, *columns):
    return frame.with_columns(pl.col(column).str.to_datetime('%Y-%m-%d %H:%M:%S') for column in columns)


# the same hospital


def digests(folder):
    files = [path for path in sorted(folder.rglob('*')) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_bytes_whatever_the_workers(built, tmp_path):
    build_hospital(tmp_path/'b', PATIENTS, 7, workers=1, progress=False)
    assert digests(built) == digests(tmp_path/'b')


def test_another_seed_is_another_hospital():
    first, second = (block_tables(seed, 0, 5)[0]['labevents'] for seed in (1, 2))
    assert not first.equals(second)


@pytest.fixture(scope='module')
def few(tmp_path_factory):
    "Folder of the hospital's first 30 patients."
    folder = tmp_path_factory.mktemp('hospital')/'few'
    build_hospital(folder, 30, 7, workers=1, progress=False)
    return folder


LAST_OF_FEW = 10_000_030


@pytest.mark.parametrize('name', TABLES)
def test_fewer_patients_are_the_first_of_more(few, read, name):
    rows, all_rows = pl.read_csv(path_of(few, name), infer_schema_length=0), read(name)
    if 'subject_id' in rows.columns:
        all_rows = all_rows.filter(pl.col('subject_id').cast(pl.Int64) <= LAST_OF_FEW)
    assert rows.equals(all_rows)


def test_truth_of_fewer_patients_is_the_first_of_more(few, truth):
    rows = pl.read_parquet(few/'truth.parquet')
    first = truth.filter(pl.col('subject_id') <= LAST_OF_FEW)
    assert rows.sort(rows.columns).equals(first.sort(rows.columns))


# whole files


@pytest.mark.parametrize('fmt', FORMATS)
def test_every_table_and_column_in_every_format(fmt, tmp_path):
    counts = build_hospital(tmp_path/'h', 3, 1, fmt=fmt, workers=1, progress=False)
    for name, table in TABLES.items():
        path = path_of(tmp_path/'h', name, fmt)
        frame = pl.read_parquet(path) if fmt == 'parquet' else pl.read_csv(path, infer_schema_length=0)
        assert frame.columns == list(table.columns), name
        assert len(frame) == counts[name], name
    assert 'CC0' in (tmp_path/'h'/'LICENSE.txt').read_text()


def test_no_table_is_empty(read):
    assert not [name for name in TABLES if not len(read(name))]


@pytest.mark.parametrize('name', [name for name, table in TABLES.items() if table.key])
def test_keys_are_unique(read, name):
    assert read(name).select(TABLES[name].key).is_unique().all()


# ids that fit

ICU_EVENTS = (
    'chartevents', 'inputevents', 'ingredientevents', 'outputevents', 'procedureevents', 'datetimeevents',
)
ED_TABLES = ('triage', 'vitalsign', 'medrecon', 'pyxis', 'diagnosis')
OF_PATIENTS = [name for name, table in TABLES.items() if 'subject_id' in table.columns and name != 'patients']
OF_ADMISSIONS = [name for name in OF_PATIENTS if 'hadm_id' in TABLES[name].columns and name != 'admissions']
ORDERED = ('pharmacy', 'prescriptions', 'emar', 'poe_detail')
CODED = {
    'diagnoses_icd': ('d_icd_diagnoses', 'd_ccs_diagnoses'),
    'diagnosis': ('d_ccs_diagnoses',),
    'procedures_icd': ('d_icd_procedures', 'd_ccs_procedures'),
}
REFERENCES = [
    *((name, 'patients', ['subject_id']) for name in OF_PATIENTS),
    *((name, 'admissions', ['subject_id', 'hadm_id']) for name in OF_ADMISSIONS),
    *((name, 'icustays', ['subject_id', 'hadm_id', 'stay_id']) for name in ICU_EVENTS),
    *((name, 'd_items', ['itemid']) for name in ICU_EVENTS),
    *((name, 'edstays', ['subject_id', 'stay_id']) for name in ED_TABLES),
    ('labevents', 'd_labitems', ['itemid']),
    *((name, 'poe', ['poe_id']) for name in ORDERED),
    *((name, 'pharmacy', ['pharmacy_id', 'poe_id']) for name in ('prescriptions', 'emar')),
    ('emar_detail', 'emar', ['emar_id', 'emar_seq']),
    ('radiology_detail', 'radiology', ['note_id']),
    ('discharge_detail', 'discharge', ['note_id']),
    *((name, book, ['icd_code', 'icd_version']) for name, books in CODED.items() for book in books),
]


@pytest.mark.parametrize('child, parent, keys', REFERENCES)
def test_ids_are_found_in_the_table_they_refer_to(read, child, parent, keys):
    ids = read(child).select(keys).drop_nulls().unique()
    known = read(parent).select(keys).unique()
    assert len(ids)
    assert len(ids.join(known, on=keys, how='anti')) == 0


def test_drug_codes_are_in_the_code_map(read):
    drugs = set(read('d_atc_prescriptions')['ndc_code'])
    assert set(read('prescriptions')['ndc']) <= drugs
    assert set(read('medrecon')['ndc']) <= drugs
    assert {len(code) for code in drugs} == {11}


def test_icu_stays_are_transfers(read):
    assert set(read('icustays')['stay_id']) <= set(read('transfers')['transfer_id'])


@pytest.mark.parametrize('name, number', [('poe', 'poe_seq'), ('emar', 'emar_seq')])
def test_numbers_within_a_patient_run_on(read, name, number):
    column = pl.col(number).cast(pl.Int64)
    each = read(name).group_by('subject_id').agg(low=column.min(), high=column.max(), rows=pl.len())
    assert (each['low'] == 1).all()
    assert (each['high'] == each['rows']).all()


# times in order

STORED = [
    *((name, 'charttime') for name in (
        'labevents', 'microbiologyevents', 'radiology', 'discharge', 'chartevents', 'emar', 'outputevents',
        'datetimeevents')),
    *((name, 'starttime') for name in ('inputevents', 'procedureevents')),
]


@pytest.mark.parametrize('name, taken', STORED)
def test_results_come_after_their_specimens(read, name, taken):
    rows = with_times(read(name).filter(pl.col(taken).is_not_null()), taken, 'storetime')
    assert (rows['storetime'] >= rows[taken]).all()


@pytest.fixture(scope='module')
def admissions(read):
    return with_times(read('admissions'), 'admittime', 'dischtime', 'edregtime', 'edouttime', 'deathtime')


@pytest.fixture(scope='module')
def icustays(read):
    return with_times(read('icustays'), 'intime', 'outtime')


@pytest.fixture(scope='module')
def edstays(read):
    return with_times(read('edstays'), 'intime', 'outtime')


def test_admissions_are_ordered(admissions):
    assert (admissions['admittime'] < admissions['dischtime']).all()


def test_emergency_stays_come_before_admissions(admissions):
    through_ed = admissions.filter(pl.col('edregtime').is_not_null())
    assert (through_ed['edregtime'] < through_ed['admittime']).all()
    assert (through_ed['admittime'] <= through_ed['edouttime']).all()


def test_death_in_hospital_is_the_end_of_the_admission(admissions, read):
    died = admissions.filter(pl.col('hospital_expire_flag') == '1')
    assert (died['deathtime'] == died['dischtime']).all()
    assert (died['discharge_location'] == 'DIED').all()
    known = died.join(read('patients'), on='subject_id')
    assert (known['dod'] == known['deathtime'].dt.to_string('%Y-%m-%d')).all()


def test_admissions_of_a_patient_do_not_overlap(admissions):
    before = pl.col('dischtime').shift().over('subject_id')
    visits = admissions.sort('subject_id', 'admittime').with_columns(before=before)
    assert (visits['admittime'] > visits['before']).drop_nulls().all()


def test_icu_stays_are_within_their_admission(icustays, admissions):
    stays = icustays.join(admissions, on='hadm_id')
    assert (stays['intime'] < stays['outtime']).all()
    assert (stays['intime'] >= stays['admittime']).all()
    assert (stays['outtime'] <= stays['dischtime']).all()


def test_transfers_leave_no_gap(read):
    places = with_times(read('transfers').filter(pl.col('hadm_id').is_not_null()), 'intime', 'outtime')
    places = places.sort('hadm_id', 'intime', 'transfer_id')
    moved = places.with_columns(next=pl.col('intime').shift(-1).over('hadm_id')).drop_nulls('next')
    assert (moved['outtime'] == moved['next']).all()
    last = places.group_by('hadm_id').agg(pl.col('eventtype').last())
    assert (last['eventtype'] == 'discharge').all()


CHARTED_AT = [
    ('labevents', 'charttime'), ('emar', 'charttime'), ('chartevents', 'charttime'), ('poe', 'ordertime'),
    ('edstays', 'intime'), ('vitalsign', 'charttime'),
]


@pytest.mark.parametrize('name, column', CHARTED_AT)
def test_nothing_is_charted_after_death(read, admissions, name, column):
    dead = admissions.drop_nulls('deathtime').select('subject_id', 'deathtime')
    rows = with_times(read(name), column).join(dead, on='subject_id')
    assert (rows[column] <= rows['deathtime']).all()


# notes that agree


def section(text, title, following):
    return re.search(rf'{title}:\n(.*?)\n\n{following}', text, re.S).group(1).split('\n')


def by_admission(frame):
    of_admissions = frame.filter(pl.col('hadm_id').is_not_null())
    return {hadm_id: rows for (hadm_id,), rows in of_admissions.group_by(['hadm_id'])}


@pytest.fixture(scope='module')
def summaries(read):
    "hadm_id -> text of the discharge summary."
    return dict(read('discharge').select('hadm_id', 'text').iter_rows())


def test_summaries_name_the_coded_diagnoses(read, summaries):
    codes = ['icd_code', 'icd_version']
    coded = by_admission(read('diagnoses_icd').join(read('d_icd_diagnoses'), on=codes))
    for hadm_id, text in summaries.items():
        written = section(text, 'Discharge Diagnosis', 'Discharge Condition')
        assert sorted(written) == sorted(coded[hadm_id]['long_title'].to_list())


def test_summaries_name_the_coded_procedures(read, summaries):
    codes = ['icd_code', 'icd_version']
    coded = by_admission(read('procedures_icd').join(read('d_icd_procedures'), on=codes))
    for hadm_id, text in summaries.items():
        written = section(text, 'Major Surgical or Invasive Procedure', 'History of Present Illness')
        done = coded[hadm_id]['long_title'].to_list() if hadm_id in coded else ['None']
        assert sorted(written) == sorted(done)


def test_summaries_quote_results_of_the_admission(read, summaries):
    results = by_admission(read('labevents').join(read('d_labitems'), on='itemid'))
    quoted = 0
    for hadm_id, text in summaries.items():
        rows = results[hadm_id].select('label', 'valuenum').iter_rows() if hadm_id in results else []
        known = {(label, float(value)) for label, value in rows}
        for line in section(text, 'Pertinent Results', 'MICROBIOLOGY'):
            for label, value in re.findall(r'(\S[^*]*?)-(-?\d+(?:\.\d+)?)\*?(?: |$)', line):
                assert (label, float(value)) in known, hadm_id
                quoted += 1
    assert quoted > 100


def test_summaries_send_patients_home_with_ordered_drugs(read, summaries):
    prescribed, named = by_admission(read('prescriptions')), 0
    for hadm_id, text in summaries.items():
        drugs = prescribed[hadm_id]['drug'].to_list() if hadm_id in prescribed else []
        lines = section(text, 'Discharge Medications', 'Discharge Disposition')
        for line in (line for line in lines if line != 'None'):
            _, medicine = line.split('. ', 1)
            assert medicine.startswith(tuple(drugs)), hadm_id
            named += 1
    assert named > 100


def test_summaries_quote_the_radiology_reports(read, summaries):
    reports, quoted = by_admission(read('radiology')), 0
    for hadm_id, text in summaries.items():
        texts = reports[hadm_id]['text'].to_list() if hadm_id in reports else []
        lines = section(text, 'IMAGING', 'Brief Hospital Course')
        for line in (line for line in lines if line != 'None'):
            exam, impression = line.split(': ', 1)
            assert any(exam in report and impression in report for report in texts), hadm_id
            quoted += 1
    assert quoted > 100


def test_summaries_know_who_died(admissions, summaries):
    died = dict(admissions.select('hadm_id', pl.col('hospital_expire_flag') == '1').iter_rows())
    for hadm_id, text in summaries.items():
        assert ('died in hospital' in text) == died[hadm_id]


def test_what_was_known_on_arrival_tells_nothing_of_the_outcome(summaries):
    for text in summaries.values():
        before, _ = text.split('Physical Exam:')
        assert 'died' not in before
        assert 'intensive' not in before.lower()
        assert 'LABS' not in before


def test_reports_name_their_exam(read):
    names = read('radiology_detail').filter(pl.col('field_name') == 'exam_name')
    reports = read('radiology').join(names, on='note_id')
    assert len(reports) == len(read('radiology'))
    named = pl.col('text').str.contains(pl.col('field_value'), literal=True)
    assert reports.select(named)['text'].all()


# the questions


def test_risks_are_probabilities(truth):
    assert truth['risk'].null_count() == 0
    assert truth['risk'].is_between(0, 1).all()


@pytest.mark.parametrize('prefix, tasks, table', [
    ('ED', 5, 'edstays'),
    ('Re', 2, 'admissions'),
    ('Le', 2, 'admissions'),
    ('In', 1, 'admissions'),
    ('IC', 8, 'icustays'),
])
def test_truth_has_one_row_for_every_question(truth, read, prefix, tasks, table):
    asked = truth.filter(pl.col('task').str.starts_with(prefix)).group_by('task').len()
    assert len(asked) == tasks
    assert set(asked['len']) == {len(read(table))}


def test_icu_questions_name_icu_stays(truth, read):
    asked = truth.filter(pl.col('task').str.starts_with('ICU'))['stay_id'].cast(pl.String)
    assert asked.is_in(read('icustays')['stay_id'].implode()).all()


@pytest.fixture(scope='module')
def labels(truth):
    "A function from a task and the column that names its row to id -> label."
    texts = truth.with_columns(pl.col('hadm_id', 'stay_id').cast(pl.String))

    def of(task, key):
        return dict(texts.filter(pl.col('task') == task).select(key, 'label').iter_rows())

    return of


def days_between(frame, begin, end):
    return (frame[end] - frame[begin]).dt.total_seconds()/DAY


def following(frame, column):
    "The patient's next of these rows, as a column `next`."
    later = pl.col(column).shift(-1).over('subject_id')
    return frame.sort('subject_id', column).with_columns(next=later)


@pytest.mark.parametrize('days', [3, 7])
def test_labels_of_length_of_stay(admissions, labels, days):
    longer = days_between(admissions, 'admittime', 'dischtime') > days
    assert labels(f'LengthOfStay_{days}day', 'hadm_id') == dict(zip(admissions['hadm_id'], longer))


def test_labels_of_hospitalization(edstays, labels):
    admitted = edstays['hadm_id'].is_not_null()
    assert labels('ED_Hospitalization', 'stay_id') == dict(zip(edstays['stay_id'], admitted))


def test_labels_of_transfer_to_the_icu(edstays, icustays, labels):
    first = icustays.sort('intime').group_by('hadm_id', maintain_order=True).agg(icu=pl.col('intime').first())
    stays = edstays.join(first, on='hadm_id', how='left')
    soon = (days_between(stays, 'outtime', 'icu') < .5).fill_null(False)
    assert labels('ED_ICU_Tranfer_12hour', 'stay_id') == dict(zip(stays['stay_id'], soon))


def test_labels_of_reattendance(edstays, labels):
    stays = following(edstays, 'intime')
    back = (days_between(stays, 'outtime', 'next') < 3).fill_null(False)
    assert labels('ED_Reattendance_3day', 'stay_id') == dict(zip(stays['stay_id'], back))


def test_labels_of_readmission_count_from_the_day_of_the_note(admissions, labels):
    visits = following(admissions, 'admittime').with_columns(note=pl.col('dischtime').dt.truncate('1d'))
    back = (days_between(visits, 'note', 'next') < 30).fill_null(False)
    assert labels('Readmission_30day', 'hadm_id') == dict(zip(visits['hadm_id'], back))


@pytest.mark.parametrize('days', [1, 3, 14])
def test_labels_of_icu_mortality(read, icustays, labels, days):
    died_on = read('patients').select('subject_id', pl.col('dod').str.to_datetime('%Y-%m-%d'))
    stays = icustays.join(died_on, on='subject_id', how='left')
    dead = (days_between(stays, 'intime', 'dod') < days + 1).fill_null(False)
    assert labels(f'ICU_Mortality_{days}day', 'stay_id') == dict(zip(stays['stay_id'], dead))


@pytest.mark.parametrize('days', [7, 14])
def test_labels_of_icu_stay(icustays, labels, days):
    stays = days_between(icustays, 'intime', 'outtime') >= days
    assert labels(f'ICU_Stay_{days}day', 'stay_id') == dict(zip(icustays['stay_id'], stays))


def test_labels_of_icu_readmission(icustays, labels):
    stays_left = pl.col('intime').cum_count(reverse=True).over('hadm_id')
    stays = icustays.sort('intime').with_columns(more=stays_left > 1)
    assert labels('ICU_Readmission', 'stay_id') == dict(zip(stays['stay_id'], stays['more']))


# risks that are true


@pytest.fixture(scope='module')
def questions():
    "Task -> risks and labels of 10,000 patients: illness only, nothing charted."
    lib, found = read_library(), {}
    for i in range(10):
        draws = Draws(1000 + i, 'hospital', 0)
        people = patients(lib, draws.of('patients'), 1000)
        visits = draw_visits(lib, people, draws.of('visits'))
        for task, _, _, risk, label in true_risks(lib, people, visits):
            found.setdefault(task, []).append(np.stack([risk, label]))
    return {task: np.concatenate(parts, axis=1) for task, parts in found.items()}


TASKS = [
    'ED_Hospitalization', 'ED_Inpatient_Mortality', 'ED_ICU_Tranfer_12hour', 'ED_Critical_Outcomes',
    'ED_Reattendance_3day', 'LengthOfStay_3day', 'LengthOfStay_7day', 'Inpatient_Mortality', 'Readmission_30day',
    'Readmission_60day', 'ICU_Mortality_1day', 'ICU_Mortality_2day', 'ICU_Mortality_3day', 'ICU_Mortality_7day',
    'ICU_Mortality_14day', 'ICU_Stay_7day', 'ICU_Stay_14day', 'ICU_Readmission',
]


def test_eighteen_questions_have_a_risk(questions):
    assert set(questions) == set(TASKS)
    assert len(TASKS) == 18


def spread(risk):
    "Standard deviation of the number of yes."
    return np.sqrt((risk*(1 - risk)).sum())


@pytest.mark.parametrize('task', TASKS)
def test_risks_are_calibrated(questions, task):
    risk, label = questions[task]
    assert abs((label - risk).sum()) < 4*spread(risk)


@pytest.mark.parametrize('task', TASKS)
def test_risks_are_calibrated_at_every_level(questions, task):
    risk, label = questions[task]
    for fifth in np.array_split(np.argsort(risk), 5):
        error = spread(risk[fifth]) + 1.5
        assert abs((label[fifth] - risk[fifth]).sum()) < 4*error


@pytest.mark.parametrize('task', TASKS)
def test_risks_tell_patients_apart_but_not_perfectly(questions, task):
    risk, label = questions[task]
    still_open = (risk > 0) & (risk < 1)
    assert roc_auc_score(label, risk) > .7
    assert .68 < roc_auc_score(label[still_open], risk[still_open]) < .96


@pytest.mark.parametrize('task, rate', [
    ('ED_Hospitalization', .476),
    ('ED_ICU_Tranfer_12hour', .0626),
    ('Readmission_30day', .224),
    ('Inpatient_Mortality', .0223),
    ('LengthOfStay_3day', .597),
    ('LengthOfStay_7day', .228),
    ('ICU_Mortality_7day', .0875),
    ('ICU_Readmission', .0976),
])
def test_base_rates_are_near_mimic(questions, task, rate):
    _, label = questions[task]
    assert .7*rate < label.mean() < 1.4*rate


# the library, the draws


def test_library_is_large():
    lib = read_library()
    assert len(lib.conditions) >= 30
    assert len(lib.chronic) >= 15


def test_library_refuses_unknown_names():
    entries = {'x': {'drugs': {'nosuch': .5}}}
    with pytest.raises(ValueError, match='conditions.toml, x, drugs.*nosuch'):
        matrix(entries, 'drugs', ['aspirin'])


def test_a_named_draw_does_not_depend_on_the_others():
    alone, among_others = Draws(7, 'hospital', 0), Draws(7, 'hospital', 0)
    among_others('acuity', 10)
    assert (alone('stay length', 5) == among_others('stay length', 5)).all()


@pytest.mark.parametrize('other', [
    Draws(8, 'hospital', 0),
    Draws(7, 'hospital', 1),
    Draws(7, 'hospital', 0).of('triage'),
])
def test_seeds_blocks_and_parts_have_draws_of_their_own(other):
    assert (Draws(7, 'hospital', 0)('pain', 5) != other('pain', 5)).all()


def test_no_two_draws_of_a_block_share_a_name():
    b = new_block(7, 0)
    for step in CHARTING:
        step(b)
    shared = [name for name, times in b.random.drawn.items() if times > 1]
    assert not shared


def test_more_draws_change_nothing_else():
    first, second = new_block(7, 0), new_block(7, 0)
    second.random('a quantity that was added', 100)
    before, after = (pl.DataFrame(chart_visits(b)['admissions']) for b in (first, second))
    assert before.equals(after)


# arguments and interruptions


def test_an_interrupted_hospital_is_none(tmp_path, monkeypatch):
    def broken(*args, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(hospital, 'csv_bytes', broken)
    with pytest.raises(KeyboardInterrupt):
        build_hospital(tmp_path/'h', 3, 1, workers=1, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_not_replaced(tmp_path):
    thesis = tmp_path/'mine'/'thesis.txt'
    thesis.parent.mkdir()
    thesis.write_text('years of work')
    with pytest.raises(FileExistsError):
        build_hospital(tmp_path/'mine', 3, 1, progress=False)
    assert thesis.exists()


@pytest.mark.parametrize('wrong', [dict(patients=0), dict(workers=0), dict(fmt='xlsx')])
def test_wrong_arguments_are_refused(wrong, tmp_path):
    arguments = dict(patients=3, seed=1, progress=False) | wrong
    with pytest.raises(ValueError):
        build_hospital(tmp_path/'h', **arguments)
