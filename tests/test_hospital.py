"The synthetic hospital: same bytes, whole files, ids that fit, notes that agree, risks that are true."
import hashlib
import re
from collections import defaultdict

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


def as_text(path):
    "The rows of a CSV file, every column as text."
    return pl.read_csv(path, infer_schema_length=0)


@pytest.fixture(scope='module')
def read(built):
    "A function from a table's name to its rows, everything as text."
    frames = {}

    def load(name):
        if name not in frames:
            frames[name] = as_text(path_of(built, name))
        return frames[name]

    return load


@pytest.fixture(scope='module')
def truth(built):
    return pl.read_parquet(built/'truth.parquet')


def with_times(frame, *columns):
    return frame.with_columns(pl.col(columns).str.to_datetime('%Y-%m-%d %H:%M:%S'))


# the same hospital


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digests(folder):
    files = [path for path in folder.rglob('*') if path.is_file()]
    return {path.relative_to(folder): digest(path) for path in files}


def test_same_bytes_whatever_the_workers(built, tmp_path):
    build_hospital(tmp_path/'b', PATIENTS, 7, workers=1, progress=False)
    assert digests(built) == digests(tmp_path/'b')


def test_another_seed_is_another_hospital():
    first, _ = block_tables(1, 0, 5)
    second, _ = block_tables(2, 0, 5)
    assert not first['labevents'].equals(second['labevents'])


@pytest.fixture(scope='module')
def few(tmp_path_factory):
    "Folder of the hospital's first 30 patients."
    folder = tmp_path_factory.mktemp('hospital')/'few'
    build_hospital(folder, 30, 7, workers=1, progress=False)
    return folder


LAST_OF_FEW = 10_000_030


@pytest.mark.parametrize('name', TABLES)
def test_fewer_patients_are_the_first_of_more(few, read, name):
    rows = as_text(path_of(few, name))
    first = read(name)
    if 'subject_id' in rows.columns:
        patient = pl.col('subject_id').cast(pl.Int64)
        first = first.filter(patient <= LAST_OF_FEW)
    assert rows.equals(first)


def test_truth_of_fewer_patients_is_the_first_of_more(few, truth):
    rows = pl.read_parquet(few/'truth.parquet')
    first = truth.filter(pl.col('subject_id') <= LAST_OF_FEW)
    columns = rows.columns
    assert rows.sort(columns).equals(first.sort(columns))


# whole files


@pytest.mark.parametrize('fmt', FORMATS)
def test_every_table_and_column_in_every_format(fmt, tmp_path):
    counts = build_hospital(tmp_path/'h', 3, 1, fmt=fmt, workers=1, progress=False)
    for name, table in TABLES.items():
        path = path_of(tmp_path/'h', name, fmt)
        frame = pl.read_parquet(path) if fmt == 'parquet' else as_text(path)
        assert frame.columns == list(table.columns), name
        assert len(frame) == counts[name], name
    assert 'CC0' in (tmp_path/'h'/'LICENSE.txt').read_text()


def test_no_table_is_empty(read):
    assert not [name for name in TABLES if not len(read(name))]


WITH_KEY = [name for name, table in TABLES.items() if table.key]


@pytest.mark.parametrize('name', WITH_KEY)
def test_keys_are_unique(read, name):
    keys = read(name).select(TABLES[name].key)
    assert keys.is_unique().all()


# ids that fit

def tables_with(column, parent):
    "Tables other than the parent that have such a column."
    return [name for name, table in TABLES.items() if column in table.columns and name != parent]


def references(children, parent, *keys):
    return [(child, parent, list(keys)) for child in children]


ICU_EVENTS = [
    'chartevents',
    'inputevents',
    'ingredientevents',
    'outputevents',
    'procedureevents',
    'datetimeevents']
ED_TABLES = ['triage', 'vitalsign', 'medrecon', 'pyxis', 'diagnosis']
OF_ORDERS = ['pharmacy', 'prescriptions', 'emar', 'poe_detail']
CODE = ('icd_code', 'icd_version')
REFERENCES = [
    *references(tables_with('subject_id', 'patients'), 'patients', 'subject_id'),
    *references(tables_with('hadm_id', 'admissions'), 'admissions', 'subject_id', 'hadm_id'),
    *references(ICU_EVENTS, 'icustays', 'subject_id', 'hadm_id', 'stay_id'),
    *references(ICU_EVENTS, 'd_items', 'itemid'),
    *references(ED_TABLES, 'edstays', 'subject_id', 'stay_id'),
    *references(['labevents'], 'd_labitems', 'itemid'),
    *references(OF_ORDERS, 'poe', 'poe_id'),
    *references(['prescriptions', 'emar'], 'pharmacy', 'pharmacy_id', 'poe_id'),
    *references(['emar_detail'], 'emar', 'emar_id', 'emar_seq'),
    *references(['radiology_detail'], 'radiology', 'note_id'),
    *references(['discharge_detail'], 'discharge', 'note_id'),
    *references(['diagnoses_icd'], 'd_icd_diagnoses', *CODE),
    *references(['diagnoses_icd', 'diagnosis'], 'd_ccs_diagnoses', *CODE),
    *references(['procedures_icd'], 'd_icd_procedures', *CODE),
    *references(['procedures_icd'], 'd_ccs_procedures', *CODE),
]


@pytest.mark.parametrize('child, parent, keys', REFERENCES)
def test_ids_are_found_in_the_table_they_refer_to(read, child, parent, keys):
    ids = read(child).select(keys).drop_nulls().unique()
    known = read(parent).select(keys).unique()
    unknown = ids.join(known, on=keys, how='anti')
    assert len(ids)
    assert unknown.is_empty()


def test_drug_codes_are_in_the_code_map(read):
    drugs = set(read('d_atc_prescriptions')['ndc_code'])
    assert set(read('prescriptions')['ndc']) <= drugs
    assert set(read('medrecon')['ndc']) <= drugs
    assert {len(code) for code in drugs} == {11}


def test_icu_stays_are_transfers(read):
    stays = set(read('icustays')['stay_id'])
    assert stays <= set(read('transfers')['transfer_id'])


@pytest.mark.parametrize('name, number', [
    ('poe', 'poe_seq'),
    ('emar', 'emar_seq'),
])
def test_numbers_within_a_patient_run_on(read, name, number):
    column = pl.col(number).cast(pl.Int64)
    numbers = read(name).group_by('subject_id').agg(
        first=column.min(),
        last=column.max(),
        rows=pl.len())
    assert (numbers['first'] == 1).all()
    assert (numbers['last'] == numbers['rows']).all()


# times in order

@pytest.mark.parametrize('name, taken', [
    ('labevents', 'charttime'),
    ('microbiologyevents', 'charttime'),
    ('radiology', 'charttime'),
    ('discharge', 'charttime'),
    ('chartevents', 'charttime'),
    ('emar', 'charttime'),
    ('outputevents', 'charttime'),
    ('datetimeevents', 'charttime'),
    ('inputevents', 'starttime'),
    ('procedureevents', 'starttime'),
])
def test_results_come_after_their_specimens(read, name, taken):
    with_specimen = read(name).drop_nulls(taken)
    rows = with_times(with_specimen, taken, 'storetime')
    assert (rows['storetime'] >= rows[taken]).all()


@pytest.fixture(scope='module')
def admissions(read):
    rows = with_times(read('admissions'), 'admittime', 'dischtime', 'edregtime', 'edouttime', 'deathtime')
    return rows.with_columns(end=pl.max_horizontal('dischtime', 'deathtime'))


@pytest.fixture(scope='module')
def icustays(read):
    return with_times(read('icustays'), 'intime', 'outtime')


@pytest.fixture(scope='module')
def edstays(read):
    return with_times(read('edstays'), 'intime', 'outtime')


def test_admissions_are_ordered(admissions):
    assert (admissions['admittime'] < admissions['dischtime']).all()


def test_emergency_stays_come_before_admissions(admissions):
    through_ed = admissions.drop_nulls('edregtime')
    assert (through_ed['edregtime'] < through_ed['admittime']).all()
    assert (through_ed['admittime'] <= through_ed['edouttime']).all()


def test_death_in_hospital_is_the_end_of_the_admission(admissions, read):
    died = admissions.filter(hospital_expire_flag='1')
    assert (died['discharge_location'] == 'DIED').all()
    known = died.join(read('patients'), on='subject_id')
    day = known['end'].dt.to_string('%Y-%m-%d')
    assert (known['dod'] == day).all()
    assert admissions.filter(hospital_expire_flag='0')['deathtime'].is_null().all()


def test_deaths_in_hospital_are_written_as_in_real_files(admissions):
    died = admissions.filter(hospital_expire_flag='1')
    after = died.filter(pl.col('deathtime') > pl.col('dischtime'))
    at_midnight = after['dischtime'] == after['deathtime'].dt.truncate('1d')
    assert 0 < len(after) < len(died)
    assert at_midnight.all()


def test_admissions_of_a_patient_do_not_overlap(admissions):
    last_discharge = pl.col('dischtime').shift().over('subject_id')
    visits = admissions.sort('subject_id', 'admittime').with_columns(before=last_discharge)
    again = visits.drop_nulls('before')
    assert (again['admittime'] > again['before']).all()


def test_icu_stays_are_within_their_admission(icustays, admissions):
    stays = icustays.join(admissions, on='hadm_id')
    assert (stays['intime'] < stays['outtime']).all()
    assert (stays['intime'] >= stays['admittime']).all()
    assert (stays['outtime'] <= stays['end']).all()


def test_transfers_leave_no_gap(read):
    of_admissions = read('transfers').drop_nulls('hadm_id')
    places = with_times(of_admissions, 'intime', 'outtime').sort('hadm_id', 'intime', 'transfer_id')
    next_intime = pl.col('intime').shift(-1).over('hadm_id')
    moved = places.with_columns(next=next_intime).drop_nulls('next')
    assert (moved['outtime'] == moved['next']).all()
    last = places.group_by('hadm_id').agg(pl.col('eventtype').last())
    assert (last['eventtype'] == 'discharge').all()


@pytest.mark.parametrize('name, column', [
    ('labevents', 'charttime'),
    ('emar', 'charttime'),
    ('chartevents', 'charttime'),
    ('poe', 'ordertime'),
    ('edstays', 'intime'),
    ('vitalsign', 'charttime'),
])
def test_nothing_is_charted_after_death(read, admissions, name, column):
    dead = admissions.drop_nulls('deathtime').select('subject_id', 'deathtime')
    times = with_times(read(name), column)
    of_dead = times.join(dead, on='subject_id')
    assert (of_dead[column] <= of_dead['deathtime']).all()


# notes that agree


def section(text, title, following):
    "Lines of a summary between a title and the next one; a section without entries has none."
    found = re.search(rf'{title}:\n(.*?)\n\n{following}', text, re.S)
    lines = found.group(1).split('\n')
    return [] if lines == ['None'] else lines


def by_admission(frame, column):
    "hadm_id -> what its rows have in a column; nothing where there are no rows."
    rows = frame.drop_nulls('hadm_id').select('hadm_id', column)
    found = defaultdict(list)
    for hadm_id, value in rows.iter_rows():
        found[hadm_id].append(value)
    return found


@pytest.fixture(scope='module')
def summaries(read):
    "hadm_id -> text of the discharge summary."
    notes = read('discharge').select('hadm_id', 'text')
    return dict(notes.iter_rows())


@pytest.fixture(scope='module')
def coded(read):
    "A function from a table of codes and their book to hadm_id -> titles."
    def titles(name, book):
        rows = read(name).join(read(book), on=CODE)
        return by_admission(rows, 'long_title')

    return titles


@pytest.mark.parametrize('name, book, title, following', [
    ('diagnoses_icd', 'd_icd_diagnoses', 'Discharge Diagnosis', 'Discharge Condition'),
    ('procedures_icd', 'd_icd_procedures', 'Major Surgical or Invasive Procedure', 'History of Present Illness'),
], ids=['diagnoses', 'procedures'])
def test_summaries_name_what_is_coded(coded, summaries, name, book, title, following):
    codes = coded(name, book)
    for hadm_id, text in summaries.items():
        written = section(text, title, following)
        assert sorted(written) == sorted(codes[hadm_id])


def test_every_summary_has_a_diagnosis(coded, summaries):
    codes = coded('diagnoses_icd', 'd_icd_diagnoses')
    assert summaries.keys() <= codes.keys()


@pytest.fixture(scope='module')
def quoted(summaries):
    "A function from a section's title and the next one to all its lines, each after its hadm_id."
    def lines(title, following):
        found = []
        for hadm_id, text in summaries.items():
            found += [(hadm_id, line) for line in section(text, title, following)]
        assert len(found) > 100
        return found

    return lines


def test_summaries_quote_results_of_the_admission(read, quoted):
    labelled = read('labevents').join(read('d_labitems'), on='itemid')
    value = pl.col('valuenum').cast(pl.Float64)
    known = set(labelled.select('hadm_id', 'label', value).iter_rows())
    found = 0
    for hadm_id, line in quoted('Pertinent Results', 'MICROBIOLOGY'):
        for label, number in re.findall(r'(\S[^*]*?)-(-?\d+(?:\.\d+)?)\*?(?: |$)', line):
            assert (hadm_id, label, float(number)) in known
            found += 1
    assert found > 100


def test_summaries_send_patients_home_with_ordered_drugs(read, quoted):
    prescribed = by_admission(read('prescriptions'), 'drug')
    for hadm_id, line in quoted('Discharge Medications', 'Discharge Disposition'):
        _, medicine = line.split('. ', 1)
        assert medicine.startswith(tuple(prescribed[hadm_id])), hadm_id


def test_summaries_quote_the_radiology_reports(read, quoted):
    reports = by_admission(read('radiology'), 'text')
    for hadm_id, line in quoted('IMAGING', 'Brief Hospital Course'):
        exam, impression = line.split(': ', 1)
        assert any(exam in report and impression in report for report in reports[hadm_id]), hadm_id


def test_summaries_know_who_died(admissions, summaries):
    for hadm_id, flag in admissions.select('hadm_id', 'hospital_expire_flag').iter_rows():
        says_so = 'died in hospital' in summaries[hadm_id]
        assert says_so == (flag == '1')


def test_what_was_known_on_arrival_tells_nothing_of_the_outcome(summaries):
    for text in summaries.values():
        before, _ = text.split('Physical Exam:')
        assert 'died' not in before
        assert 'intensive' not in before.lower()
        assert 'LABS' not in before


def test_reports_name_their_exam(read):
    reports = read('radiology')
    exams = read('radiology_detail').filter(field_name='exam_name')
    with_exam = reports.join(exams, on='note_id')
    assert len(with_exam) == len(reports)
    named = with_exam['text'].str.contains(with_exam['field_value'], literal=True)
    assert named.all()


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
    asked = truth.filter(pl.col('task').str.starts_with(prefix))
    sizes = asked.group_by('task').len()
    assert len(sizes) == tasks
    assert set(sizes['len']) == {len(read(table))}


def test_icu_questions_name_icu_stays(truth, read):
    asked = truth.filter(pl.col('task').str.starts_with('ICU'))
    stays = asked['stay_id'].cast(pl.String)
    assert set(stays) <= set(read('icustays')['stay_id'])


@pytest.fixture(scope='module')
def check_labels(truth):
    "A function that compares the labels of a task with what is expected of each row, which a column names."
    texts = truth.with_columns(pl.col('hadm_id', 'stay_id').cast(pl.String))

    def check(task, key, rows, expected):
        labels = texts.filter(task=task).select(key, 'label')
        assert dict(labels.iter_rows()) == dict(zip(rows[key], expected))

    return check


def days_between(frame, begin, end):
    "Days as fractions; null where there is no end."
    return (frame[end] - frame[begin]).dt.total_seconds()/DAY


def within(frame, begin, end, days):
    "Does the one follow the other so soon? Not where it never does."
    soon = days_between(frame, begin, end) < days
    return soon.fill_null(False)


def following(frame, column):
    "The patient's next of these rows, as a column `next`."
    later = pl.col(column).shift(-1).over('subject_id')
    return frame.sort('subject_id', column).with_columns(next=later)


@pytest.mark.parametrize('days', [3, 7])
def test_labels_of_length_of_stay(admissions, check_labels, days):
    longer = days_between(admissions, 'admittime', 'end') > days
    check_labels(f'LengthOfStay_{days}day', 'hadm_id', admissions, longer)


def test_labels_of_hospitalization(edstays, check_labels):
    admitted = edstays['hadm_id'].is_not_null()
    check_labels('ED_Hospitalization', 'stay_id', edstays, admitted)


def test_labels_of_transfer_to_the_icu(edstays, icustays, check_labels):
    first = icustays.group_by('hadm_id').agg(icu=pl.col('intime').min())
    stays = edstays.join(first, on='hadm_id', how='left')
    soon = within(stays, 'outtime', 'icu', .5)
    check_labels('ED_ICU_Tranfer_12hour', 'stay_id', stays, soon)


def test_labels_of_reattendance(edstays, check_labels):
    stays = following(edstays, 'intime')
    back = within(stays, 'outtime', 'next', 3)
    check_labels('ED_Reattendance_3day', 'stay_id', stays, back)


def test_labels_of_readmission_count_from_the_day_of_the_note(admissions, check_labels):
    day_of_note = pl.col('dischtime').dt.truncate('1d')
    visits = following(admissions, 'admittime').with_columns(note=day_of_note)
    back = within(visits, 'note', 'next', 30)
    check_labels('Readmission_30day', 'hadm_id', visits, back)


@pytest.mark.parametrize('days', [1, 3, 14])
def test_labels_of_icu_mortality(read, icustays, check_labels, days):
    day_of_death = pl.col('dod').str.to_datetime('%Y-%m-%d')
    died_on = read('patients').select('subject_id', day_of_death)
    stays = icustays.join(died_on, on='subject_id', how='left')
    dead = within(stays, 'intime', 'dod', days + 1)
    check_labels(f'ICU_Mortality_{days}day', 'stay_id', stays, dead)


@pytest.mark.parametrize('days', [7, 14])
def test_labels_of_icu_stay(icustays, check_labels, days):
    longer = days_between(icustays, 'intime', 'outtime') >= days
    check_labels(f'ICU_Stay_{days}day', 'stay_id', icustays, longer)


def test_labels_of_icu_readmission(icustays, check_labels):
    stays_left = pl.col('intime').cum_count(reverse=True).over('hadm_id')
    stays = icustays.sort('intime').with_columns(stays_left=stays_left)
    check_labels('ICU_Readmission', 'stay_id', stays, stays['stays_left'] > 1)


# risks that are true


@pytest.fixture(scope='module')
def questions():
    "Task -> risks and labels of 10,000 patients: illness only, nothing charted."
    library = read_library()
    found = defaultdict(list)
    for seed in range(1000, 1010):
        draws = Draws(seed, 'hospital', 0)
        people = patients(library, draws.of('patients'), 1000)
        visits = draw_visits(library, people, draws.of('visits'))
        for task, _, _, risk, label in true_risks(library, people, visits):
            found[task].append(np.stack([risk, label]))
    return {task: np.hstack(parts) for task, parts in found.items()}


TASKS = [
    'ED_Hospitalization',
    'ED_Inpatient_Mortality',
    'ED_ICU_Tranfer_12hour',
    'ED_Critical_Outcomes',
    'ED_Reattendance_3day',
    'LengthOfStay_3day',
    'LengthOfStay_7day',
    'Inpatient_Mortality',
    'Readmission_30day',
    'Readmission_60day',
    'ICU_Mortality_1day',
    'ICU_Mortality_2day',
    'ICU_Mortality_3day',
    'ICU_Mortality_7day',
    'ICU_Mortality_14day',
    'ICU_Stay_7day',
    'ICU_Stay_14day',
    'ICU_Readmission',
]


def test_eighteen_questions_have_a_risk(questions):
    assert set(questions) == set(TASKS)
    assert len(TASKS) == 18


def spread(risk):
    "Standard deviation of the number of yes."
    variance = risk*(1 - risk)
    return np.sqrt(variance.sum())


def surplus(risk, label):
    "How many more are yes than the risks say."
    return label.sum() - risk.sum()


@pytest.mark.parametrize('task', TASKS)
def test_risks_are_calibrated(questions, task):
    risk, label = questions[task]
    assert abs(surplus(risk, label)) < 4*spread(risk)


@pytest.mark.parametrize('task', TASKS)
def test_risks_are_calibrated_at_every_level(questions, task):
    risk, label = questions[task]
    for fifth in np.array_split(np.argsort(risk), 5):
        error = spread(risk[fifth]) + 1.5
        assert abs(surplus(risk[fifth], label[fifth])) < 4*error


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
    drawn = alone('stay length', 5)
    assert (among_others('stay length', 5) == drawn).all()


@pytest.mark.parametrize('other', [
    Draws(8, 'hospital', 0),
    Draws(7, 'hospital', 1),
    Draws(7, 'hospital', 0).of('triage'),
])
def test_seeds_blocks_and_parts_have_draws_of_their_own(other):
    draws = Draws(7, 'hospital', 0)
    assert (draws('pain', 5) != other('pain', 5)).all()


def test_no_two_draws_of_a_block_share_a_name():
    block = new_block(7, 0)
    for step in CHARTING:
        step(block)
    shared = [name for name, times in block.random.drawn.items() if times > 1]
    assert not shared


def admissions_of(block):
    return pl.DataFrame(chart_visits(block)['admissions'])


def test_more_draws_change_nothing_else():
    block, with_more = new_block(7, 0), new_block(7, 0)
    with_more.random('a quantity that was added', 100)
    assert admissions_of(with_more).equals(admissions_of(block))


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
